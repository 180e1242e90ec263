"""Real SGLang with the plugin inside, driven by its sockets alone: no supervision, no adapter.

It moves layers with the same handover that drives vLLM, and has as much of an engine as the streams of the tests need.
"""

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from engines.errors import RefactoringAborted
from engines.protocol import EngineCounters, GenerationRequest, RefactorProgress
from engines.served.channel import Channel
from engines.served.handover import LayerHandover, MoveSpec
from engines.served.plugin_path import plugin_path
from engines.served.ranks import Ranks
from planner.handover import HandoverLimits, HandoverPhase
from planner.layout import Pipeline
from tests.support.sglang import interpreter
from tests.support.until import until

PLUGIN = Path(__file__).parents[2] / "engines" / "sglang" / "plugin"
_START_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class PluginDriver:
    """One SGLang of resident ranks."""

    def __init__(self, directory: Path, core: Channel, sides: dict[int, Channel], ready: dict[str, Any]) -> None:
        self._directory = directory
        self.core = core
        self.sides = sides
        self.ready = ready
        self.ranks = Ranks(device_ids=tuple(f"cpu:{rank}" for rank in range(ready["pp_size"])))
        self.layout: list[int] = ready["layout"]
        self.epoch = 0
        self.crashes: list[str] = []
        self.limits = HandoverLimits(commit_deadline_s=60.0)
        self.verify = True  # compare the checksums of the KV caches at each commit
        self.cached_tokens: dict[str, int] = {}  # of each request's prompt, as SGLang told it
        self._numbers = 0
        self._live = 0
        self._http = aiohttp.ClientSession(
            "http://sglang",
            connector=aiohttp.UnixConnector(str(directory / "http.sock"), limit=0, force_close=True),  # as the adapter
        )

    @property
    def pipeline(self) -> Pipeline:
        return self.ranks.pipeline_of([self.layout.count(rank) for rank in range(self.ranks.count)])

    async def close(self) -> None:
        await self._http.close()
        for channel in (self.core, *self.sides.values()):
            await channel.close()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Leaving the iterator aborts the request: SGLang notices that its client is gone."""
        params = {
            "max_new_tokens": request.sampling.max_tokens,
            "temperature": 0.0,
            "ignore_eos": request.sampling.ignore_eos,
        }
        body = {
            "input_ids": list(request.prompt_token_ids),
            "sampling_params": params,
            "stream": True,
            "return_logprob": True,
        }
        self._live += 1
        tokens = 0
        try:
            async with self._http.post("/generate", json=body, timeout=aiohttp.ClientTimeout(total=None)) as answer:
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    reason = event.get("meta_info", {}).get("finish_reason") or {}
                    assert "error" not in event, event
                    assert reason.get("type") != "abort", reason
                    self.cached_tokens[request.request_id] = event["meta_info"]["cached_tokens"]
                    found = event["meta_info"]["output_token_logprobs"]
                    new = found[tokens:] if len(found) > tokens else []
                    tokens += len(new)
                    yield Chunk(token_ids=tuple(t[1] for t in new), logprobs=tuple(t[0] for t in new))
        finally:
            self._live -= 1

    async def refactor(self, target: Pipeline) -> AsyncIterator[RefactorProgress]:
        """Move, and yield reports as they come."""
        reports: asyncio.Queue[RefactorProgress | None] = asyncio.Queue()
        moving = asyncio.create_task(self._move(target, reports.put_nowait))
        moving.add_done_callback(lambda _moving: reports.put_nowait(None))
        while (report := await reports.get()) is not None:
            yield report
        await moving

    async def _move(self, target: Pipeline, on_progress: Callable[[RefactorProgress], None]) -> None:
        self._numbers += 1
        new_layout = [rank for rank, count in enumerate(self.ranks.counts_of(target)) for _ in range(count)]
        handover = LayerHandover(
            target,
            MoveSpec(
                number=self._numbers,
                epoch=self.epoch + 1,
                layout=tuple(self.layout),
                new_layout=tuple(new_layout),
                block_tokens=self.ready["kv_block_tokens"],
                commit_deadline_s=20.0,
                verify_checksums=self.verify,
                weights_total_bytes=0,
                requests_live=lambda: self._live,
            ),
            core=self.core,
            ranks={rank: (side,) for rank, side in self.sides.items()},
            limits=self.limits,
            on_progress=on_progress,
            on_crash=self.crashes.append,
        )
        result = await handover.run()
        if result.state.phase is HandoverPhase.ABORTED or self.crashes:
            raise RefactoringAborted(result.state.reason or "; ".join(self.crashes))
        self.epoch += 1
        self.layout = new_layout

    async def counters(self) -> EngineCounters:
        """Return them as the adapter does, but for what only that counts."""
        return EngineCounters(**await self.core.core("counters"), worker_restarts_total=0, refactorings_total=0)

    async def status(self) -> list[dict[str, Any]]:
        return [await self.sides[rank].call("status") for rank in sorted(self.sides)]

    async def drain(self) -> None:
        async def is_idle() -> bool:
            found = await self.counters()
            # SGLang calls a request finished a moment before it lets go of its KV cache; one that leaks is still held.
            return not (found.running or found.waiting or found.kv_blocks_used)

        await until(is_idle, timeout_s=60)

    async def arm(self, name: str, action: str, *, rank: int | None = None) -> None:
        if rank is None:
            await self.core.core("arm", name, action)
        else:
            await self.sides[rank].call("arm", name=name, action=action)


@asynccontextmanager
async def driven(
    model: Path,
    counts: Sequence[int],
    *,
    more: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    verify: bool = True,
    log: Path | None = None,
) -> AsyncIterator[PluginDriver]:
    """Start SGLang with that many layers on each rank."""
    directory = Path(tempfile.mkdtemp(prefix="flexpiped-plugin-"))
    python = interpreter()
    environment = {
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
        "HOME": os.environ.get("HOME", "/"),
        "PYTHONPATH": plugin_path(PLUGIN),
        "FLEXPIPED_SGLANG_DIR": str(directory),
        "SGLANG_PLUGINS": "flexpiped",
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{directory}/rendezvous",
        "SGLANG_PP_LAYER_PARTITION": ",".join(map(str, counts)),
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(["0-1"] * len(counts)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    } | dict(variables or {})
    output = (log or directory / "log").open("wb")
    process = await asyncio.create_subprocess_exec(
        *(python, "-m", "sglang.launch_server", "--model-path", str(model), "--device", "cpu"),
        *("--attention-backend", "torch_native", "--dtype", "float32", "--pp-size", str(len(counts))),
        *("--mem-fraction-static", "0.05", "--host", "127.0.0.1", "--skip-server-warmup", *more),
        env=environment,
        cwd=directory,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(_START_S):
            driver = await _connected(directory, len(counts), process)
        driver.verify = verify
        try:
            yield driver
        finally:
            await driver.close()
    finally:
        if process.returncode is not None:
            print(f"SGLang had ended with {process.returncode}:\n{_last_words(Path(output.name))}")
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        await process.wait()
        output.close()
        shutil.rmtree(directory, ignore_errors=True)


def _last_words(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


async def _connected(directory: Path, ranks: int, process: asyncio.subprocess.Process) -> PluginDriver:
    names = ["engine.sock", "http.sock", *(f"rank-{rank}.sock" for rank in range(ranks))]
    while not all((directory / name).exists() for name in names):
        if process.returncode is not None:
            raise AssertionError(f"SGLang ended with {process.returncode}")
        await asyncio.sleep(0.2)
    greeting: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    core = await Channel.connect(directory / "engine.sock", on_message=greeting.put_nowait)
    sides = {rank: await Channel.connect(directory / f"rank-{rank}.sock") for rank in range(ranks)}
    return PluginDriver(directory, core, sides, await greeting.get())
