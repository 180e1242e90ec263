"""The public fake keeps the contract, and its knobs do what they say."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from engines.errors import EngineDied, EngineStartFailed, RefactoringAborted
from engines.fake import FAKE_CAPABILITIES, RICH_CAPABILITIES, FakeEngine
from engines.protocol import Engine
from planner.handover import HandoverPhase
from planner.layout import Pipeline, pipeline_of
from tests.contract.contract_requests import assert_idle, chunks_of, in_flight, request_of, tokens_of
from tests.contract.engine_contract import EngineContract
from tests.support.until import until

ONE = pipeline_of(device_ids=["cpu:0"], cuts=[], num_decoders=8)
TWO = pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[4], num_decoders=8)
FOUR = pipeline_of(device_ids=["cpu:0", "cpu:1", "cpu:2", "cpu:3"], cuts=[2, 4, 6], num_decoders=8)


def silent(_message: str) -> None:
    pass


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(pipeline=ONE, capabilities=RICH_CAPABILITIES)
    await engine.start(on_progress=silent)
    yield engine
    await engine.close()


class TestFake(EngineContract):
    @pytest.fixture
    def disposable_engine(self, engine: FakeEngine) -> Engine:
        return engine

    @pytest.fixture
    def targets(self) -> tuple[Pipeline, ...]:
        return (TWO, FOUR)


async def test_kill_ends_streams_with_the_reason_and_keeps_what_was_reported(engine: FakeEngine) -> None:
    request = request_of(max_tokens=20)
    whole = await tokens_of(engine, request)
    received: list[int] = []

    async def consume() -> None:
        async for chunk in engine.generate(request):
            received.extend(chunk.token_ids)
            if len(received) == 3:
                engine.kill("segmentation fault")

    with pytest.raises(EngineDied, match="segmentation fault"):
        await consume()
    assert tuple(received) == whole[: len(received)]
    assert await engine.died() == "segmentation fault"
    with pytest.raises(EngineDied):
        await engine.counters()


async def test_a_held_engine_gives_nothing_and_can_still_be_left(engine: FakeEngine) -> None:
    engine.hold()
    stream = asyncio.create_task(chunks_of(engine, request_of()))
    await until(lambda: in_flight(engine))
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    await assert_idle(engine)


async def test_preemption_changes_no_token() -> None:
    tight = FakeEngine(pipeline=ONE, kv_blocks_capacity=FAKE_CAPABILITIES.max_model_len // 16 + 1)
    await tight.start(on_progress=silent)
    requests = [request_of((5, 6, i), max_tokens=300) for i in range(4)]
    alone = [await tokens_of(tight, request) for request in requests]
    together = await asyncio.gather(*(tokens_of(tight, request) for request in requests))
    assert together == alone
    assert (await tight.counters()).preemptions_total > 0
    await assert_idle(tight)
    await tight.close()


async def test_a_refactoring_can_be_cancelled_before_commit(engine: FakeEngine) -> None:
    engine.hold_refactoring()
    reports = engine.refactor(TWO)
    phases = [(await anext(reports)).phase]
    assert await engine.cancel_refactor()
    phases += [(await anext(reports)).phase, (await anext(reports)).phase]
    with pytest.raises(RefactoringAborted):
        await anext(reports)
    assert phases == [HandoverPhase.PREPARING, HandoverPhase.ROLLING_BACK, HandoverPhase.ABORTED]
    assert (engine.pipeline, engine.epoch) == (ONE, 0)


async def test_a_death_ends_a_refactoring(engine: FakeEngine) -> None:
    engine.hold_refactoring()
    reports = engine.refactor(TWO)
    await anext(reports)
    engine.kill("gone")
    with pytest.raises(EngineDied):
        await anext(reports)


async def test_start_can_fail() -> None:
    with pytest.raises(EngineStartFailed, match="no memory"):
        await FakeEngine(pipeline=ONE, start_failure="no memory").start(on_progress=silent)
