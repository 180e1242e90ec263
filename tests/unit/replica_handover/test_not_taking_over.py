"""A second instance that does not come or must not, and engines that die or are closed: nothing is left behind."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from engines.errors import EngineDied, RefactoringAborted
from engines.fake import FAKE_CAPABILITIES, FakeEngine
from engines.protocol import EngineCapabilities, RefactorProgress
from engines.restarts import RestartPolicy
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervision import SupervisorState
from flexpiped.supervisor import Supervisor
from planner.handover import HandoverPhase
from tests.support.until import until
from tests.unit.replica_handover.stand import (
    FOUR,
    LIMITS,
    STREAMS,
    TWO,
    Streams,
    Workshop,
    assert_idle,
    background,
    take_over,
)


async def test_a_second_instance_that_does_not_start_changes_nothing(
    supervisor: Supervisor, streams: Streams, workshop: Workshop
) -> None:
    workshop.start_failures = ["no memory on cpu:3"]
    streams.begin()
    await streams.reach(10)
    with pytest.raises(RefactoringAborted, match="given up: no memory on cpu:3; the first instance serves on"):
        await take_over(supervisor)
    assert (supervisor.engine, supervisor.pipeline, supervisor.epoch) == (workshop.engines[0], TWO, 0)
    assert workshop.engines[1].is_closed
    await streams.assert_exact()
    await assert_idle(workshop.engines[0], supervisor)
    await take_over(supervisor)
    assert supervisor.pipeline == FOUR


@pytest.mark.parametrize(
    ("capabilities", "why"),
    [
        (replace(FAKE_CAPABILITIES, max_model_len=256), "has a context of 256 tokens, the first 512"),
        (replace(FAKE_CAPABILITIES, vocab_size=1024), "has another vocabulary"),
        (replace(FAKE_CAPABILITIES, generates=False), "only embeds, classifies or scores, the first generates"),
    ],
)
async def test_a_second_instance_that_could_not_go_on_is_refused(
    supervisor: Supervisor, workshop: Workshop, capabilities: EngineCapabilities, why: str
) -> None:
    workshop.capabilities = capabilities
    with pytest.raises(RefactoringAborted, match=why):
        await take_over(supervisor)
    assert supervisor.engine is workshop.engines[0]


async def test_a_start_that_takes_too_long_is_given_up(supervisor: Supervisor, workshop: Workshop) -> None:
    workshop.may_start.clear()
    runner = ReplicaRunner(supervisor, FOUR, limits=replace(LIMITS, start_deadline_s=0.01))
    with pytest.raises(RefactoringAborted, match=r"not ready after 0\.01 s"):
        await background(runner)
    assert supervisor.engine is workshop.engines[0]


async def test_cancel_while_starting(supervisor: Supervisor, streams: Streams, workshop: Workshop) -> None:
    streams.begin()
    await streams.reach(5)
    workshop.may_start.clear()
    runner = ReplicaRunner(supervisor, FOUR, limits=LIMITS)
    handing_over = background(runner)
    await until(lambda: len(workshop.engines) == 2)
    assert await runner.cancel()
    with pytest.raises(RefactoringAborted, match="cancelled; the first instance serves on, no request disturbed"):
        await handing_over
    assert not await runner.cancel()
    assert workshop.engines[1].is_closed
    await streams.assert_exact()
    await assert_idle(workshop.engines[0], supervisor)


async def test_a_cancellation_that_comes_with_the_word_ready_wins(supervisor: Supervisor, workshop: Workshop) -> None:
    """The second instance is ready, but the switch has not been made."""
    runner = ReplicaRunner(supervisor, FOUR, limits=LIMITS)

    async def cancel_late() -> None:
        async for report in runner.run():
            if report.message == "second instance: starting the fake engine":
                assert await runner.cancel()

    with pytest.raises(RefactoringAborted, match="cancelled"):
        await cancel_late()
    assert supervisor.engine is workshop.engines[0]
    assert workshop.engines[1].is_closed


async def test_cancelled_before_it_began(supervisor: Supervisor, workshop: Workshop) -> None:
    runner = ReplicaRunner(supervisor, FOUR, limits=LIMITS)
    assert await runner.cancel()
    with pytest.raises(RefactoringAborted, match="cancelled; the first instance serves on"):
        await background(runner)
    assert len(workshop.engines) == 1


async def test_past_the_switch_it_is_not_cancelled(supervisor: Supervisor, streams: Streams) -> None:
    streams.begin(4)
    await streams.reach(5)
    runner = ReplicaRunner(supervisor, FOUR, limits=LIMITS)
    answers = [await runner.cancel() async for report in runner.run() if report.phase is HandoverPhase.SYNCING]
    assert answers == [False] * 5
    assert supervisor.pipeline == FOUR
    await streams.assert_exact()


async def test_the_first_dies_while_the_second_starts(
    supervisor: Supervisor, streams: Streams, workshop: Workshop
) -> None:
    streams.begin()
    await streams.reach(5)
    workshop.may_start.clear()
    handing_over = background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    await until(lambda: len(workshop.engines) == 2)
    workshop.engines[0].kill("out of memory")
    await until(lambda: supervisor.supervision.state is SupervisorState.RECOVERING)
    assert supervisor.supervision.reason == (
        "the engine died (out of memory) while a second instance is starting, which takes over; requests wait"
    )
    workshop.may_start.set()
    last = (await handing_over)[-1]
    assert last.message.endswith("the first one died (out of memory)")
    assert last.requests_live == STREAMS
    await streams.assert_exact()
    assert len(workshop.engines) == 2
    assert supervisor.pipeline == FOUR
    workshop.engines[1].kill("again")  # it is watched
    assert (await supervisor.ready_engine(other_than=workshop.engines[1])).pipeline == FOUR


@pytest.mark.parametrize("how", ["fails", "cancelled"])
async def test_the_first_dies_and_the_second_does_not_come(
    supervisor: Supervisor, streams: Streams, workshop: Workshop, how: str
) -> None:
    streams.begin()
    await streams.reach(5)
    workshop.may_start.clear()
    workshop.start_failures = ["no memory"]
    runner = ReplicaRunner(supervisor, FOUR, limits=LIMITS)
    handing_over = background(runner)
    await until(lambda: len(workshop.engines) == 2)
    workshop.engines[0].kill("killed")
    await until(lambda: supervisor.supervision.state is SupervisorState.RECOVERING)
    if how == "cancelled":
        assert await runner.cancel()
        await until(lambda: workshop.engines[1].is_closed)
    workshop.may_start.set()
    with pytest.raises(RefactoringAborted, match=r"ordinary recovery goes on; the first one died \(killed\)"):
        await handing_over
    await streams.assert_exact()
    assert len(workshop.engines) == 3
    assert (supervisor.pipeline, supervisor.epoch) == (TWO, 0)
    await assert_idle(workshop.engines[2], supervisor)


@pytest.mark.parametrize("victim", [0, 1], ids=["first", "second"])
async def test_one_of_both_dies_during_the_take_over(
    supervisor: Supervisor, streams: Streams, workshop: Workshop, victim: int
) -> None:
    streams.begin()
    await streams.reach(5)
    last: RefactorProgress | None = None
    async for last in ReplicaRunner(supervisor, FOUR, limits=LIMITS).run():
        if last.message == "7 of 32 requests taken over":
            workshop.engines[victim].kill("killed")
    assert last is not None
    assert last.phase is HandoverPhase.DONE
    await streams.assert_exact()
    assert len(workshop.engines) == 2 + victim
    assert (supervisor.engine, supervisor.pipeline) == (workshop.engines[-1], FOUR)
    assert workshop.engines[0].is_closed
    await assert_idle(workshop.engines[-1], supervisor)


async def test_a_second_instance_that_dies_for_good_is_a_failure(workshop: Workshop) -> None:
    supervisor = Supervisor(
        factory=workshop.make, pipeline=TWO, policy=RestartPolicy(max_deaths=1), sleep=workshop.sleep
    )
    await supervisor.start()
    streams = Streams(supervisor)
    streams.begin(4)
    await streams.reach(5)

    async def hand_over() -> None:
        async for report in ReplicaRunner(supervisor, FOUR, limits=LIMITS).run():
            if report.message == "1 of 4 requests taken over":
                workshop.engines[1].kill("no device")

    with pytest.raises(EngineDied, match="at last: no device"):
        await hand_over()
    ends = await asyncio.gather(*streams.tasks, return_exceptions=True)
    # What had gone over is lost with its engine, the one under way perhaps; the others end at the first.
    assert (type(ends[0]), ends[2:]) == (EngineDied, [None, None])
    assert supervisor.supervision.state is SupervisorState.FAILED
    await supervisor.close()
    assert all(engine.is_closed for engine in workshop.engines)


async def test_closing_the_supervisor_ends_both(supervisor: Supervisor, workshop: Workshop) -> None:
    workshop.may_start.clear()
    handing_over = background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    await until(lambda: len(workshop.engines) == 2)
    await supervisor.close()
    assert all(engine.is_closed for engine in workshop.engines)
    handing_over.cancel()
    await asyncio.gather(handing_over, return_exceptions=True)


async def test_a_mistake_in_an_engine_ends_the_handover_and_nothing_else(
    supervisor: Supervisor, streams: Streams, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises what the protocol does not know, before the switch and after."""

    async def drain(_engine: FakeEngine) -> None:
        raise ZeroDivisionError

    async def start(_engine: FakeEngine, *, on_progress: Callable[[str], None]) -> None:
        raise ZeroDivisionError(on_progress)

    streams.begin(4)
    await streams.reach(5)
    with monkeypatch.context() as patched:
        patched.setattr(FakeEngine, "start", start)
        with pytest.raises(ZeroDivisionError):
            await background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    assert (supervisor.engine, workshop.engines[1].is_closed) == (workshop.engines[0], True)
    monkeypatch.setattr(FakeEngine, "drain", drain)
    with pytest.raises(ZeroDivisionError):
        await background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    assert (supervisor.engine, workshop.engines[0].is_closed) == (workshop.engines[2], True)
    await streams.assert_exact()


async def test_reports_that_nobody_reads_any_more_leave_no_second_instance(
    supervisor: Supervisor, workshop: Workshop
) -> None:
    workshop.may_start.clear()
    handing_over = background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    await until(lambda: len(workshop.engines) == 2)
    handing_over.cancel()
    await asyncio.wait([handing_over])
    assert [engine.is_closed for engine in workshop.engines] == [False, True]
    assert supervisor.engine is workshop.engines[0]
