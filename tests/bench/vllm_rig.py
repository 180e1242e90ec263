"""vLLM under flexpiped's engine, in this process's hands: moved in place, restarted, or paused its own way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from engines.checkpoint import read_checkpoint
from engines.protocol import RefactorProgress
from engines.served.ranks import Ranks, boot_counts
from engines.vllm.adapter import VllmEngine
from engines.vllm.options import VllmOptions
from planner.layout import Pipeline
from planner.model_graph import ModelGraph, build_model_graph
from tests.bench import direct
from tests.bench.program import DEVICES, EngineSetup, prompts
from tests.bench.rigs import WARM, longest_output

RANKS = 4
_PLACES = Ranks(device_ids=DEVICES[:RANKS])
# In place, with another number of stages each: layers leave two ranks, come back, and go to the last one.
LAPS = tuple(_PLACES.pipeline_of(counts) for counts in ((2, 2, 2, 2), (4, 0, 0, 4), (3, 0, 3, 2)))


class VllmRig:
    """One vLLM of four pipeline ranks."""

    name = "vLLM"
    laps = LAPS

    def __init__(self, options: VllmOptions, graph: ModelGraph, engine: VllmEngine) -> None:
        self._options = options
        self._graph = graph
        self.engine = engine
        self._streams = direct.HeldStreams([], max_tokens=1)

    async def begin(self, streams: int, prompt_tokens: int) -> None:
        # Each leg begins with an empty prefix cache: what earlier legs left there would have to move, too.
        await post(self.engine, "/reset_prefix_cache")
        given = prompts(count=streams, length=prompt_tokens, seed=streams)
        self._streams = direct.HeldStreams(given, max_tokens=longest_output(streams, prompt_tokens))
        await self._streams.start(self.engine, warm_tokens=WARM)
        await self.engine.trace()
        self._streams.take()

    async def end(self) -> None:
        await self._streams.stop()
        await self.engine.drain()

    async def times(self) -> list[list[float]]:
        return self._streams.take()

    async def step_ends(self) -> list[float]:
        ends: list[float] = (await self.engine.trace())["ends_s"]
        return ends

    async def move(self, target: Pipeline) -> list[RefactorProgress]:
        return await direct.move(self.engine, target)

    async def restart(self, target: Pipeline) -> None:
        """Stop vLLM, start it with the new partition (the nearest it boots with), resubmit with the tokens."""
        await self.engine.close()
        await self._streams.stop()
        nearest = _PLACES.pipeline_of(boot_counts(_PLACES.counts_of(target)))
        self.engine = VllmEngine(self._options, nearest, graph=self._graph)
        await self.engine.start(on_progress=lambda _message: None)
        await self._streams.start(self.engine, warm_tokens=1)

    async def pause(self, hold_s: float) -> None:
        """Pause generation as vLLM itself offers it (``mode=keep``), hold it, and resume."""
        await post(self.engine, "/pause?mode=keep")
        await asyncio.sleep(hold_s)
        await post(self.engine, "/resume")

    async def close(self) -> None:
        await self._streams.stop()
        await self.engine.close()


async def post(engine: VllmEngine, path: str) -> None:
    """Ask vLLM's own server, which offers this to developers."""
    socket = aiohttp.UnixConnector(path=str(engine.own_routes_socket))
    async with (
        aiohttp.ClientSession(connector=socket, base_url="http://vllm", raise_for_status=True) as session,
        session.post(path),
    ):
        pass


def options_for(model: Path, graph: ModelGraph, setup: EngineSetup, *, python: Path) -> VllmOptions:
    """Return the engine's options, as the daemon's defaults where ``setup`` says nothing."""
    return VllmOptions(
        python=str(python),
        model_directory=str(model),
        device_ids=DEVICES[:RANKS],
        device_memory_bytes=setup.device_memory_bytes,
        num_decoders=graph.num_decoders,
        kv_bytes_per_token=graph.decoders[0].kv_bytes_per_token,
        dtype="float32",
        kv_cache_bytes=setup.kv_cache_bytes,
        threads=setup.threads,
        nice=setup.nice,
        env={"VLLM_SERVER_DEV_MODE": "1"},  # offers /pause
    )


@asynccontextmanager
async def vllm_rig(model: Path, setup: EngineSetup, *, python: Path) -> AsyncIterator[VllmRig]:
    """Start vLLM with the first layout; it ends with the scope."""
    checkpoint = read_checkpoint(model)
    graph = build_model_graph(checkpoint.config, checkpoint.tensors, dtype="float32")
    options = options_for(model, graph, setup, python=python)
    rig = VllmRig(options, graph, VllmEngine(options, LAPS[0], graph=graph))
    try:
        await rig.engine.start(on_progress=lambda _message: None)
        yield rig
    finally:
        await rig.close()
