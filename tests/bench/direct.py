"""The engine driven directly, without daemon and HTTP: what the other ways are compared with."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol

from engines.errors import EngineError
from engines.native.adapter import NativeEngine
from engines.native.options import NativeOptions
from engines.protocol import Engine, GenerationRequest, RefactorProgress, SamplingParams, TokenChunk
from planner.layout import Pipeline
from tests.bench.load_messages import Load
from tests.bench.program import DEVICES, EngineSetup

_WARM_DEADLINE_S = 60.0


def options_for(model: Path, setup: EngineSetup) -> NativeOptions:
    """Return the engine's options: as the daemon's defaults where ``setup`` says nothing."""
    return NativeOptions(
        model_directory=str(model),
        device_ids=DEVICES[: setup.devices],
        device_memory_bytes=setup.device_memory_bytes,
        dtype="float32",
        threads=setup.threads,
        threads_per_device=setup.threads_per_device,
        nice=setup.nice,
        kv_cache_bytes=setup.kv_cache_bytes,
        kv_device_bytes=setup.kv_device_bytes,
        max_micro_batches=setup.max_micro_batches,
    )


@asynccontextmanager
async def running(options: NativeOptions, pipeline: Pipeline) -> AsyncIterator[NativeEngine]:
    """Start an engine; it ends with the scope."""
    engine = NativeEngine(options, pipeline)
    try:
        await engine.start(on_progress=lambda _message: None)
        yield engine
    finally:
        await engine.close()


async def move(engine: Engine, target: Pipeline) -> list[RefactorProgress]:
    """Refactor and return all reports."""
    return [report async for report in engine.refactor(target)]


async def complete(engine: Engine, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> Load:
    """Complete all prompts at once; one time for each token."""
    streams = [_Stream(prompt, max_tokens, number) for number, prompt in enumerate(prompts)]
    started_s = time.monotonic()
    await asyncio.gather(*(stream.follow(engine) for stream in streams))
    return Load(
        tokens=sum(len(stream.tokens) for stream in streams),
        started_s=started_s,
        ended_s=time.monotonic(),
        times_s=[stream.times_s for stream in streams],
        cpu_s=time.process_time(),
    )


class Generator(Protocol):
    """An engine, or what stands before engines."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]: ...


class HeldStreams:
    """Streams that go on until told to stop, and that another engine can continue."""

    def __init__(self, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> None:
        self._streams = [_Stream(prompt, max_tokens, number) for number, prompt in enumerate(prompts)]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, engine: Generator, *, warm_tokens: int) -> None:
        """Begin, or go on from the tokens that are there; return when each has ``warm_tokens`` new ones."""
        wanted = [len(stream.tokens) + warm_tokens for stream in self._streams]
        self._tasks = [asyncio.create_task(stream.follow(engine)) for stream in self._streams]
        async with asyncio.timeout(_WARM_DEADLINE_S):
            while any(len(s.tokens) < count for s, count in zip(self._streams, wanted, strict=True)):
                await asyncio.sleep(0.005)
                self._raise_failures()

    async def stop(self) -> None:
        """Abort whatever still runs."""
        for task in self._tasks:
            task.cancel()
        with suppress(EngineError):  # of streams whose engine was closed
            for result in await asyncio.gather(*self._tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
        self._tasks.clear()

    @property
    def contexts(self) -> list[int]:
        """How many tokens each stream has, with its prompt."""
        return [stream.context_tokens for stream in self._streams]

    def take(self) -> list[list[float]]:
        """Return when tokens came since the last call, for each stream.

        Raises:
            RuntimeError: A stream has ended.
        """
        self._raise_failures()
        if any(task.done() for task in self._tasks):
            raise RuntimeError("a stream has ended within a measurement: give it more tokens")
        times = [stream.times_s for stream in self._streams]
        for stream in self._streams:
            stream.times_s = []
        return times

    def _raise_failures(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error


class RenewedStreams:
    """As many streams at any time, each of which another follows: the contexts are of the same lengths all the time.

    Whatever takes longer would else be compared with a time when contexts were shorter, and steps faster.
    """

    def __init__(self, *, count: int, prompts: Iterator[Sequence[int]], max_tokens: int) -> None:
        self._count = count
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._times_s: list[float] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, engine: Generator) -> None:
        """Begin; return when contexts are of all lengths: the first streams end at different times."""
        self._tasks = [asyncio.create_task(self._follow(engine, number)) for number in range(self._count)]
        async with asyncio.timeout(_WARM_DEADLINE_S):
            while len(self._times_s) < self._count * self._max_tokens // 2:
                await asyncio.sleep(0.005)
                self._raise_failures()

    async def stop(self) -> None:
        """Abort whatever still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def take(self) -> list[float]:
        """Return when tokens came since the last call, of all streams, in order."""
        self._raise_failures()
        times_s = self._times_s.copy()
        self._times_s.clear()  # streams go on with this list
        return times_s

    async def _follow(self, engine: Generator, number: int) -> None:
        wanted = self._max_tokens * (number + 1) // self._count
        while True:
            stream = _Stream(next(self._prompts), wanted, number, times_s=self._times_s)
            await stream.follow(engine)
            wanted = self._max_tokens

    def _raise_failures(self) -> None:
        for task in self._tasks:
            if task.done() and (error := task.exception()) is not None:
                raise error


class _Stream:
    def __init__(
        self, prompt: Sequence[int], max_tokens: int, number: int, *, times_s: list[float] | None = None
    ) -> None:
        self._name = f"bench-{number}"
        self._prompt = tuple(prompt)
        self._max_tokens = max_tokens
        self.tokens: list[int] = []
        self.times_s: list[float] = [] if times_s is None else times_s

    @property
    def context_tokens(self) -> int:
        return len(self._prompt) + len(self.tokens)

    async def follow(self, engine: Generator) -> None:
        request = GenerationRequest(
            request_id=self._name,
            prompt_token_ids=self._prompt,
            generated_token_ids=tuple(self.tokens),
            sampling=SamplingParams(max_tokens=self._max_tokens, ignore_eos=True),
        )
        async for chunk in engine.generate(request):
            now = time.monotonic()
            self.tokens += chunk.token_ids
            self.times_s += [now] * len(chunk.token_ids)
