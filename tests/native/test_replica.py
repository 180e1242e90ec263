"""A second native engine takes over from the first while requests stream: the tokens are those of undisturbed runs."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from engines.closing import closing
from engines.errors import EngineClosed, RefactoringAborted
from engines.native.adapter import NativeEngine
from engines.protocol import GenerationRequest, RefactorProgress
from flexpiped.api.backend import Serving
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervisor import Supervisor
from planner.handover import HandoverPhase
from planner.layout import Pipeline
from tests.support.native import collect, even, llama, options_for, request

pytestmark = [pytest.mark.engine, pytest.mark.real_loop]

STREAMS = 8
TOKENS = 150


class Made:
    """Makes native engines and remembers them."""

    def __init__(self) -> None:
        self.engines: list[NativeEngine] = []

    def __call__(self, pipeline: Pipeline, epoch: int) -> NativeEngine:
        self.engines.append(NativeEngine(options_for(llama()), pipeline, epoch=epoch))
        return self.engines[-1]


@pytest.fixture
def made() -> Made:
    return Made()


@pytest.fixture
async def supervisor(made: Made) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(factory=made, pipeline=even(2))
    await supervisor.start()
    yield supervisor
    await supervisor.close()


def stream(index: int) -> GenerationRequest:
    """Greedy and seeded requests in turns."""
    prompt = tuple(5 + (index * 37 + i * 11) % 500 for i in range(8 + 9 * (index % 5)))
    return request(prompt, max_tokens=TOKENS, temperature=0.9 * (index % 2), seed=1000 + index)


class Streams:
    """Requests that run again and again, so that at any time so many are under way."""

    def __init__(self, serving: Serving, count: int) -> None:
        self._serving = serving
        self._count = count
        self._stop = asyncio.Event()
        self._under_way = asyncio.Event()  # each has got a few tokens
        self._reading: asyncio.Task[None] | None = None
        self.whole: list[tuple[int, list[int]]] = []

    async def begin(self) -> None:
        """Return when each has got a few tokens."""
        self._reading = asyncio.create_task(self._read_all())
        await self._under_way.wait()

    async def end(self) -> None:
        """Return when each request that was begun has ended."""
        self._stop.set()
        assert self._reading is not None
        await self._reading

    async def _read_all(self) -> None:
        started: set[int] = set()
        async with asyncio.TaskGroup() as group:
            for index in range(self._count):
                group.create_task(self._read(index, started))

    async def _read(self, index: int, started: set[int]) -> None:
        while not self._stop.is_set():
            tokens: list[int] = []
            async with closing(self._serving.generate(stream(index))) as chunks:
                async for chunk in chunks:
                    tokens.extend(chunk.token_ids)
                    if len(tokens) > 5:
                        started.add(index)
                    if len(started) == self._count:
                        self._under_way.set()
            self.whole.append((index, tokens))


async def assert_idle(engine: NativeEngine, supervisor: Supervisor) -> None:
    await engine.drain()
    counters = await engine.counters()
    assert (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)
    assert len(supervisor.flights) == 0


async def test_8_streams_go_on_at_a_second_instance_token_exactly(supervisor: Supervisor, made: Made) -> None:
    """First one that is cancelled while it starts, then one to its end."""
    expected = [(await collect(made.engines[0], stream(index)))[0] for index in range(STREAMS)]
    streams = Streams(supervisor, STREAMS)
    await streams.begin()

    reports = [report async for report in cancelled_while_starting(ReplicaRunner(supervisor, even(4)))]
    assert reports[-1].message.endswith("cancelled; the first instance serves on, no request disturbed")
    assert (supervisor.engine, supervisor.pipeline, len(made.engines)) == (made.engines[0], even(2), 2)

    last = [report async for report in ReplicaRunner(supervisor, even(4)).run()][-1]
    assert (last.phase, last.epoch, supervisor.pipeline) == (HandoverPhase.DONE, 1, even(4))
    taken_over = r"the second instance serves, ([2-8]) of \1 requests taken over: \1 computed again"
    assert re.fullmatch(taken_over, last.message)
    await streams.end()

    assert len(streams.whole) >= STREAMS
    assert all(tokens == expected[index] for index, tokens in streams.whole)
    with pytest.raises(EngineClosed):
        await made.engines[0].counters()
    assert supervisor.engine is made.engines[2]
    await assert_idle(made.engines[2], supervisor)


async def cancelled_while_starting(runner: ReplicaRunner) -> AsyncIterator[RefactorProgress]:
    with suppress(RefactoringAborted):
        async for report in runner.run():
            if report.message != "second instance: starting" and report.phase is HandoverPhase.PREPARING:
                await runner.cancel()
            yield report
