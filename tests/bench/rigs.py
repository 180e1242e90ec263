"""What a handover is measured on: the engine driven directly, or a daemon over HTTP. One interface for both."""

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from engines.native.adapter import NativeEngine
from engines.native.options import NativeOptions
from engines.protocol import RefactorProgress
from planner.layout import Pipeline
from tests.bench import direct
from tests.bench.daemon_process import DaemonProcess, daemon
from tests.bench.http_client import HttpClient, http_client
from tests.bench.program import MAX_CONTEXT, EngineSetup, checkpoint, even, prompts, setup_of

_KV_TOKENS = 64 << 10  # as EngineSetup's KV cache holds
NATIVE_LAPS = tuple(even(stages) for stages in (4, 2, 8, 1))
WARM = 32  # tokens of each stream before anything is measured


def longest_output(
    streams: int, prompt_tokens: int, *, max_context: int = MAX_CONTEXT, kv_tokens: int = _KV_TOKENS
) -> int:
    """Return how many tokens each stream may produce within the context, without preemption."""
    return min(max_context, kv_tokens // streams) - prompt_tokens - 64


@asynccontextmanager
async def both_ways(options: argparse.Namespace) -> AsyncIterator[tuple[HttpClient, DaemonProcess, NativeEngine]]:
    """Have the same model behind a daemon and driven directly, on the same number of stages, and a client."""
    model = await asyncio.to_thread(checkpoint, options)
    setup = setup_of(options)
    async with (
        http_client() as client,
        daemon(model, setup, stages=options.stages) as server,
        direct.running(direct.options_for(model, setup), even(options.stages)) as engine,
    ):
        yield client, server, engine


class Rig(Protocol):
    """Streams that run while the layout changes. Times are seconds of the monotonic clock, equal in all processes."""

    @property
    def name(self) -> str: ...

    @property
    def laps(self) -> tuple[Pipeline, ...]:
        """The layouts to go through again and again, each with another number of stages. The first is in force."""

    async def begin(self, streams: int, prompt_tokens: int) -> None:
        """Start streams and return when all are well under way. Times taken later begin here."""

    async def end(self) -> None:
        """Stop the streams."""

    async def times(self) -> list[list[float]]:
        """Return when tokens came to the client since ``begin``, for each stream."""

    async def step_ends(self) -> list[float]:
        """Return when the engine's steps ended since ``begin``, by its own clock; nothing where that is not seen."""

    async def move(self, target: Pipeline) -> list[RefactorProgress]:
        """Change the layout and return all reports."""


@runtime_checkable
class Restartable(Rig, Protocol):
    """A rig whose engine can be stopped and started instead."""

    async def restart(self, target: Pipeline) -> None:
        """What a refactoring replaces: stop the engine, start one with the target layout, resubmit with the tokens."""


class DirectRig:
    """The engine in this process's hands. ``longest``: as ``longest_output``."""

    name = "direct"

    def __init__(
        self,
        options: NativeOptions,
        engine: NativeEngine,
        *,
        laps: tuple[Pipeline, ...],
        longest: Callable[[int, int], int],
    ) -> None:
        self.laps = laps
        self._longest = longest
        self._options = options
        self._engine = engine
        self._streams = direct.HeldStreams([], max_tokens=1)

    async def begin(self, streams: int, prompt_tokens: int) -> None:
        given = prompts(count=streams, length=prompt_tokens, seed=streams)
        self._streams = direct.HeldStreams(given, max_tokens=self._longest(streams, prompt_tokens))
        await self._streams.start(self._engine, warm_tokens=WARM)
        await self._engine.trace()
        self._streams.take()

    async def end(self) -> None:
        await self._streams.stop()
        await self._engine.drain()

    async def times(self) -> list[list[float]]:
        return self._streams.take()

    async def step_ends(self) -> list[float]:
        return (await self._engine.trace()).ends_s

    async def move(self, target: Pipeline) -> list[RefactorProgress]:
        return await direct.move(self._engine, target)

    async def restart(self, target: Pipeline) -> None:
        await self._engine.close()
        await self._streams.stop()
        self._engine = NativeEngine(self._options, target)
        await self._engine.start(on_progress=lambda _message: None)
        await self._streams.start(self._engine, warm_tokens=1)

    async def close(self) -> None:
        await self._streams.stop()
        await self._engine.close()


class HttpRig:
    """A daemon, and the client process that streams from it."""

    name = "http"
    laps = NATIVE_LAPS

    def __init__(self, server: DaemonProcess, client: HttpClient) -> None:
        self._server = server
        self._client = client

    async def begin(self, streams: int, prompt_tokens: int) -> None:
        given = prompts(count=streams, length=prompt_tokens, seed=streams)
        max_tokens = longest_output(streams, prompt_tokens)
        await self._client.hold(self._server.url, given, max_tokens=max_tokens, warm_events=WARM)

    async def end(self) -> None:
        await self._client.stop()

    async def times(self) -> list[list[float]]:
        load = await self._client.take()
        if load.restarts:
            raise RuntimeError("a stream has ended within a measurement: give it more tokens")
        return load.times_s

    async def step_ends(self) -> list[float]:
        return []

    async def move(self, target: Pipeline) -> list[RefactorProgress]:
        return await self._server.move(target)


@asynccontextmanager
async def direct_rig(
    options: NativeOptions,
    *,
    laps: tuple[Pipeline, ...] = NATIVE_LAPS,
    longest: Callable[[int, int], int] = longest_output,
) -> AsyncIterator[DirectRig]:
    """Start an engine with the first of ``laps``."""
    engine = NativeEngine(options, laps[0])
    rig = DirectRig(options, engine, laps=laps, longest=longest)
    try:
        await engine.start(on_progress=lambda _message: None)
        yield rig
    finally:
        await rig.close()


@asynccontextmanager
async def http_rig(model: Path, first: Pipeline, setup: EngineSetup) -> AsyncIterator[HttpRig]:
    """Start a daemon, bring it to the layout ``first``, and start the client."""
    async with daemon(model, setup, stages=first.granularity) as server, http_client() as client:
        await server.move(first)
        yield HttpRig(server, client)
