"""The one place through which a refactoring enters."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from engines.errors import EngineDied, RefactoringBusy, RefactoringRefused
from engines.fake import FakeEngine
from engines.protocol import RefactorProgress
from flexpiped.config_values import Auto
from flexpiped.events import EventLog
from flexpiped.handover_records import HandoverRecord, HandoverResult, Proposal, Wanted
from flexpiped.refactoring import Refactorings, Started
from planner.errors import NoFeasiblePlan
from planner.handover import HandoverPhase
from planner.layout import Pipeline
from tests.support.layouts import EvenResolver, even_pipeline
from tests.support.until import until


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(pipeline=even_pipeline(2))
    await engine.start(on_progress=lambda _: None)
    yield engine
    await engine.close()


@pytest.fixture
def events() -> EventLog:
    return EventLog()


@pytest.fixture
def refactorings(engine: FakeEngine, events: EventLog) -> Refactorings:
    return Refactorings(
        engine=lambda: engine,
        resolver=EvenResolver,
        events=events,
        monotonic_clock=lambda: 5.0,
        wall_clock=lambda: 1_000.0,
    )


async def ended(refactorings: Refactorings) -> HandoverRecord:
    await until(lambda: refactorings.under_way is None)
    return refactorings.history[-1]


async def test_a_refactoring_runs_and_is_remembered(refactorings: Refactorings, engine: FakeEngine) -> None:
    started = await refactorings.start(Wanted(stages=4))

    assert isinstance(started, Started)
    record = await ended(refactorings)
    assert (record.number, record.stages_before, record.stages_after) == (1, 2, 4)
    assert (record.result, record.finished_unix_s, record.duration_s) == (HandoverResult.DONE, 1_000.0, 0.0)
    assert record.layers_moved == 7  # decoders 2 to 7, and the head
    assert engine.pipeline == even_pipeline(4)


BEGINS_S = {"prepare": 0.0, "sync": 2.0, "commit": 2.5, "retire": 2.625, "done": 3.0}


class Timed(FakeEngine):
    """Its phases begin at these seconds."""

    async def refactor(self, target: Pipeline) -> AsyncIterator[RefactorProgress]:
        async for report in super().refactor(target):
            yield replace(report, elapsed_s=BEGINS_S[report.phase.value])


async def test_what_each_phase_took_is_remembered() -> None:
    engine = Timed(pipeline=even_pipeline(2))
    await engine.start(on_progress=lambda _: None)
    refactorings = Refactorings(engine=lambda: engine, resolver=EvenResolver, events=EventLog())
    await refactorings.start(Wanted(stages=4))

    assert (await ended(refactorings)).phases_s == {
        HandoverPhase.PREPARING: 2.0,
        HandoverPhase.SYNCING: 0.5,
        HandoverPhase.COMMITTING: 0.125,
        HandoverPhase.RETIRING: 0.375,
    }
    await engine.close()


async def test_its_progress_is_published(refactorings: Refactorings, events: EventLog) -> None:
    await refactorings.start(Wanted(stages=4))
    await ended(refactorings)

    published = events.since(0)
    assert [event.fields["state"] for event in published] == ["plan", *["progress"] * 5, "ended"]
    phases = [event.fields["progress"]["phase"] for event in published if event.fields["state"] == "progress"]
    assert phases == ["prepare", "sync", "commit", "retire", "done"]
    assert published[-1].fields["record"]["result"] == "done"
    assert {event.fields["handover"] for event in published} == {1}


async def test_it_is_logged(refactorings: Refactorings) -> None:
    with capture_logs() as logs:
        await refactorings.start(Wanted(stages=4))
        await ended(refactorings)

    assert logs == [
        {"event": "refactoring started", "log_level": "info", "number": 1, "stages": "2 -> 4 stages"},
        {"event": "refactoring ended", "log_level": "info", "number": 1, "result": "done", "duration_s": 0.0},
    ]


async def test_a_dry_run_moves_nothing(refactorings: Refactorings, engine: FakeEngine, events: EventLog) -> None:
    proposal = await refactorings.propose(Wanted(layout="4"))

    assert (proposal.target, proposal.check.feasible) == (even_pipeline(4), True)
    assert (engine.pipeline, events.last_sequence) == (even_pipeline(2), 0)


async def test_the_layout_in_force_is_nothing_to_do(refactorings: Refactorings) -> None:
    proposal = await refactorings.start(Wanted(stages=2))

    assert isinstance(proposal, Proposal)
    assert not proposal.changes_something
    assert refactorings.history == ()


async def test_one_at_a_time_and_the_second_learns_what_is_going_on(
    refactorings: Refactorings, engine: FakeEngine
) -> None:
    engine.hold_refactoring()
    await refactorings.start(Wanted(stages=4))
    await until(lambda: "prepare" in (refactorings.under_way or ""))

    with pytest.raises(RefactoringBusy, match=r"busy: handover #1, 2 -> 4 stages, is in phase prepare"):
        await refactorings.start(Wanted(stages=1))

    engine.release_refactoring()
    assert (await ended(refactorings)).result is HandoverResult.DONE


async def test_what_does_not_fit_is_refused(refactorings: Refactorings, events: EventLog) -> None:
    with pytest.raises(NoFeasiblePlan, match="8 decoder layers"):
        await refactorings.start(Wanted(stages=9))
    assert events.last_sequence == 0
    assert isinstance(await refactorings.start(Wanted(stages=Auto.AUTO)), Started)


async def test_what_the_engine_cannot_hold_is_refused_with_its_numbers(events: EventLog) -> None:
    engine = FakeEngine(pipeline=even_pipeline(2, num_decoders=16))
    await engine.start(on_progress=lambda _: None)
    refactorings = Refactorings(engine=lambda: engine, resolver=EvenResolver, events=events)

    with pytest.raises(RefactoringRefused, match="at most 8 stages"):
        await refactorings.start(Wanted(stages=9))
    await engine.close()


async def test_cancel_rolls_back(refactorings: Refactorings, engine: FakeEngine) -> None:
    engine.hold_refactoring()
    await refactorings.start(Wanted(stages=4))
    await until(lambda: "prepare" in (refactorings.under_way or ""))

    assert await refactorings.cancel()
    record = await ended(refactorings)
    assert record.result is HandoverResult.ABORTED
    assert "rolled back" in record.message
    assert engine.pipeline == even_pipeline(2)
    assert not await refactorings.cancel()


async def test_an_engine_that_dies_fails_it_and_frees_the_place(refactorings: Refactorings, engine: FakeEngine) -> None:
    engine.hold_refactoring()
    await refactorings.start(Wanted(stages=4))
    await until(lambda: "prepare" in (refactorings.under_way or ""))
    engine.kill("out of memory")

    record = await ended(refactorings)
    assert (record.result, record.message) == (HandoverResult.FAILED, "out of memory")
    with pytest.raises(EngineDied):
        await refactorings.start(Wanted(stages=4))


async def test_closing_rolls_back_and_waits(refactorings: Refactorings, engine: FakeEngine) -> None:
    engine.hold_refactoring()
    await refactorings.start(Wanted(stages=4))
    await until(lambda: "prepare" in (refactorings.under_way or ""))

    await refactorings.close()

    assert refactorings.under_way is None
    assert refactorings.history[-1].result is HandoverResult.ABORTED


async def test_what_breaks_a_rule_of_the_planner_is_refused_though_the_engine_would_take_it() -> None:
    engine = FakeEngine(pipeline=even_pipeline(2))
    await engine.start(on_progress=lambda _: None)
    resolver = EvenResolver(rules_broken=("stage 1 needs 9 MiB, cpu:1 offers 8 MiB",))
    refactorings = Refactorings(engine=lambda: engine, resolver=lambda: resolver, events=EventLog())
    proposal = await refactorings.propose(Wanted(stages=4))
    assert (proposal.check.feasible, proposal.check.sentences) == (False, resolver.rules_broken)
    with pytest.raises(RefactoringRefused, match="cpu:1 offers 8 MiB"):
        await refactorings.start(Wanted(stages=4))
    await engine.close()
