"""An engine with a server of its own in this process's hands: moved in place, or stopped and started again."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from engines.checkpoint import read_checkpoint
from engines.process import memory_pss_bytes
from engines.protocol import RefactorProgress
from engines.served.engine import ServedEngine
from engines.served.ranks import Ranks, boot_counts
from planner.layout import Pipeline
from planner.model_graph import ModelGraph, build_model_graph
from tests.bench import direct
from tests.bench.program import DEVICES, EngineSetup, prompts
from tests.bench.rigs import WARM, longest_output
from tests.bench.tables import mib, table

RANKS = 4
_MEMORY_STREAMS, _MEMORY_PROMPT_TOKENS = 8, 512  # while memory is measured
_TOUCHED_S = 2.0  # after which the streams have touched what came
_PLACES = Ranks(device_ids=DEVICES[:RANKS])
# In place, with another number of stages each: layers leave two ranks, come back, and go to the last one.
LAPS = tuple(_PLACES.pipeline_of(counts) for counts in ((2, 2, 2, 2), (4, 0, 0, 4), (3, 0, 3, 2)))


class ServedRig(ABC):
    """One engine of four pipeline ranks."""

    name: str
    laps = LAPS

    def __init__(self) -> None:
        self.engine = self._make(LAPS[0])
        self._streams = direct.HeldStreams([], max_tokens=1)

    @abstractmethod
    def _make(self, pipeline: Pipeline) -> ServedEngine:
        """Return an engine that boots with this layout."""

    @abstractmethod
    async def _empty_prefix_cache(self) -> None:
        """What earlier legs left there would have to move, too."""

    async def start(self) -> None:
        await self.engine.start(on_progress=lambda _message: None)

    async def begin(self, streams: int, prompt_tokens: int) -> None:
        await self._empty_prefix_cache()
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
        """Stop the engine, start it with the new partition (the nearest it boots with), resubmit with the tokens."""
        await self.engine.close()
        await self._streams.stop()
        self.engine = self._make(_PLACES.pipeline_of(boot_counts(_PLACES.counts_of(target))))
        await self.start()
        await self._streams.start(self.engine, warm_tokens=1)

    async def close(self) -> None:
        await self._streams.stop()
        await self.engine.close()


async def post(engine: ServedEngine, path: str, *, key: str = "") -> None:
    """Ask the engine's own server."""
    socket = aiohttp.UnixConnector(path=str(engine.own_routes_socket))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        aiohttp.ClientSession(connector=socket, base_url="http://engine", raise_for_status=True) as session,
        session.post(path, headers=headers),
    ):
        pass


def common_options(model: str, graph: ModelGraph, setup: EngineSetup, *, python: str) -> dict[str, Any]:
    """Return the engine's options by name, as the daemon's defaults where ``setup`` says nothing."""
    return {
        "python": python,
        "model_directory": model,
        "device_ids": DEVICES[:RANKS],
        "device_memory_bytes": setup.device_memory_bytes,
        "num_decoders": graph.num_decoders,
        "kv_bytes_per_token": graph.decoders[0].kv_bytes_per_token,
        "dtype": "float32",
        "kv_cache_bytes": setup.kv_cache_bytes,
        "threads": setup.threads,
        "nice": setup.nice,
    }


def graph_of(model: Path, *, dtype: str = "float32") -> ModelGraph:
    """Return the graph of a checkpoint that is computed in ``dtype``."""
    checkpoint = read_checkpoint(model)
    return build_model_graph(checkpoint.config, checkpoint.tensors, dtype=dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """What one rank holds. ``kv_bytes`` is address space for its KV caches, of which what was written has memory."""

    decoders: tuple[int, ...]
    weights_bytes: int
    kv_bytes: int
    pss_bytes: int

    @property
    def held(self) -> str:
        return ",".join(map(str, self.decoders)) or "-"


async def measure_memory(rig: ServedRig, raw: dict[str, Any], *, restart: bool) -> None:
    """Print what each rank holds before and after moves under streams, and beside it after a restart instead.

    Without streams nothing would touch the weights that come in a move, nor the KV caches. The last move leads back to
    the first layout, and so does the restart.
    """
    targets = [*rig.laps[1:], rig.laps[0]]
    rows = []
    for number, target in enumerate(targets, start=1):
        await rig.begin(_MEMORY_STREAMS, _MEMORY_PROMPT_TOKENS)
        before = await _memory_of(rig)
        await rig.move(target)
        await asyncio.sleep(_TOUCHED_S)
        after = await _memory_of(rig)
        rows += _changes(f"move {number}", before, after)
        if restart and number == len(targets):
            await rig.restart(target)
            await asyncio.sleep(_TOUCHED_S)
            anew = await _memory_of(rig)
            rows += _changes("that, then a restart", after, anew)
        await rig.end()
    head = ["memory of the ranks (MiB)", "decoders", "weights", "KV capacity", "PSS"]
    table(f"before and after, under {_MEMORY_STREAMS} streams", head, rows)
    raw["memory"] = rows


async def _memory_of(rig: ServedRig) -> list[RankMemory]:
    seen = []
    for rank, pid in enumerate(rig.engine.pids["workers"]):
        status = await rig.engine.rank_status(rank)
        seen.append(
            RankMemory(
                decoders=tuple(status["layers"]),
                weights_bytes=status["weights_bytes"],
                kv_bytes=status["kv_mapped_bytes"],
                pss_bytes=memory_pss_bytes(pid) or 0,
            )
        )
    return seen


def _changes(name: str, before: Sequence[RankMemory], after: Sequence[RankMemory]) -> list[list[str]]:
    rows = []
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        sizes = [(old.weights_bytes, new.weights_bytes), (old.kv_bytes, new.kv_bytes), (old.pss_bytes, new.pss_bytes)]
        changes = [f"{mib(was)} -> {mib(now)}" for was, now in sizes]
        rows.append([f"{name}, rank {rank}", f"{old.held} -> {new.held}", *changes])
    return rows
