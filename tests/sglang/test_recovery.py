"""Streams go on token-exactly after the death of any of SGLang's processes. Greedy, in fp32."""

import asyncio
import os
import signal
from collections.abc import Callable
from typing import cast

import pytest

from engines.protocol import Engine
from engines.sglang.adapter import SglangEngine
from flexpiped.supervisor import Supervisor
from planner.layout import Pipeline
from tests.sglang.conftest import Shared
from tests.sglang.recovering import Made, pid_of
from tests.support.own_routes import Started
from tests.vllm.streams import STREAMS, Result, run_streams, stream

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="session")]
TOKENS = 60


class Lent(Started):
    """An engine that outlives its supervisor; only one that has died is closed by that."""

    def __init__(self, engine: SglangEngine, *, serves: bool) -> None:
        super().__init__(engine)
        self._serves = serves
        self._died = False

    async def start(self, *, on_progress: Callable[[str], None]) -> None:
        if not self._serves:
            await self._engine.start(on_progress=on_progress)

    async def died(self) -> str:
        reason = await self._engine.died()
        self._died = True
        return reason

    async def close(self) -> None:
        if self._died:
            await self._engine.close()


class Succession:
    """Makes engines; the first is one that serves already."""

    def __init__(self, first: SglangEngine) -> None:
        self.engines = [first]
        self._make = Made()
        self._is_begun = False

    def __call__(self, pipeline: Pipeline, epoch: int) -> Engine:
        if self._is_begun:
            self.engines.append(self._make(pipeline, epoch))
        lent = Lent(self.engines[-1], serves=not self._is_begun)
        self._is_begun = True
        return cast("Engine", lent)


async def survive(shared: Shared, *victims: str) -> None:
    """Have processes killed one after the other under streams, which are the same each time."""
    made = Succession(shared.engine)
    supervisor = Supervisor(factory=made, pipeline=shared.engine.pipeline)
    undisturbed = await run_streams(shared.engine, max_tokens=TOKENS)
    await supervisor.start()
    try:
        for count, victim in enumerate(victims, start=1):
            await survive_one(supervisor, made, victim, undisturbed)
            assert len(made.engines) == count + 1, victim
            shared.engine = made.engines[-1]
    finally:
        await supervisor.close()


async def survive_one(supervisor: Supervisor, made: Succession, victim: str, undisturbed: Result) -> None:
    begun = [asyncio.Event() for _ in range(STREAMS)]

    async def read(index: int) -> list[int]:
        tokens: list[int] = []
        async for chunk in supervisor.generate(stream(index, max_tokens=TOKENS)):
            tokens += chunk.token_ids
            begun[index].set()
        return tokens

    reading = [asyncio.create_task(read(index)) for index in range(STREAMS)]
    await asyncio.gather(*(event.wait() for event in begun))
    os.kill(pid_of(made.engines[-1], victim), signal.SIGKILL)
    assert await asyncio.gather(*reading) == [tokens for tokens, _ in undisturbed], victim


async def test_streams_survive_the_death_of_a_scheduler(shared: Shared) -> None:
    await survive(shared, "the last scheduler")


@pytest.mark.long
async def test_streams_survive_the_death_of_any_other_process(shared: Shared) -> None:
    await survive(shared, "the API server", "the first scheduler", "the detokenizer")
