"""The control loop with the fake engine: it decides, acts as an operator would, and says why."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pytest

from engines.errors import EngineDied
from engines.fake import FakeEngine
from engines.protocol import Engine
from flexpiped.auto import AutoControl, constants_of
from flexpiped.events import EventLog
from flexpiped.handover_records import HandoverResult, Wanted
from flexpiped.load_monitor import LoadSampler
from flexpiped.refactoring import Refactorings, Started
from flexpiped.settings import AutoMode, AutoSettings
from planner.arrivals import Absence
from planner.errors import NoFeasiblePlan
from planner.granularity import Candidate
from planner.layout import pipeline_of
from planner.load import Observation
from planner.policy_state import Action, Ending, PolicyConstants, Verb
from tests.support.clock import Clock
from tests.support.layouts import EvenResolver, even_pipeline
from tests.support.until import until
from tests.unit.planner.policies import FOUR, TWO
from tests.unit.test_scaling import ScaleStand

SETTINGS = AutoSettings(mode=AutoMode.ON, confirm_s=0.0, dwell_s=10.0, cool_down_s=1.0, guard_s=5.0)


class Given:
    """Candidates as a test says, or what it raises."""

    def __init__(self) -> None:
        self.candidates: tuple[Candidate, ...] = (TWO, FOUR)
        self.error: NoFeasiblePlan | None = None
        self.start_in_words = ""

    async def of(self, _engine: Engine, _seen: Observation) -> tuple[Candidate, ...]:
        if self.error is not None:
            raise self.error
        return self.candidates

    async def starting_now(self, found: Sequence[Candidate]) -> tuple[Candidate, ...]:
        return tuple(replace(each, start_in_words=self.start_in_words) for each in found)


@dataclass(slots=True, kw_only=True)
class Stand:
    clock: Clock
    engine: FakeEngine
    load: LoadSampler
    given: Given
    refactorings: Refactorings
    control: AutoControl
    is_there: bool = True
    bed: "Bed" = field(default_factory=lambda: Bed())

    def ask(self, count: int, *, over_s: float) -> None:
        """Let requests come evenly, each answered at once."""
        for index in range(count):
            self.clock.now_s += over_s / count
            self.load.arrived(index)
            self.load.first_token(index)
            self.load.ended(index, prompt_tokens=10, output_tokens=1, tpot_s=None)

    async def settled(self) -> None:
        await until(lambda: self.refactorings.under_way is None and self.control.is_settled)


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    engine = FakeEngine(pipeline=even_pipeline(2))
    await engine.start(on_progress=lambda _: None)
    clock, given = Clock(100.0), Given()

    def serving() -> Engine:
        if not stand.is_there:
            raise EngineDied("killed by a test")
        return engine

    load = LoadSampler(clock=clock)
    refactorings = Refactorings(engine=serving, resolver=EvenResolver, events=EventLog(), monotonic_clock=clock)
    control = AutoControl(
        SETTINGS,
        engine=serving,
        load=load,
        candidates=given,
        refactorings=refactorings,
        decided=EventLog(),
        clock=clock,
    )
    stand = Stand(clock=clock, engine=engine, load=load, given=given, refactorings=refactorings, control=control)
    yield stand
    await control.close()
    await engine.close()


async def test_overload_changes_the_layout_and_says_why(stand: Stand) -> None:
    stand.ask(400, over_s=30)
    decision = await stand.control.cycle()
    assert decision is not None
    assert decision.verb is Verb.CHANGE
    await stand.settled()
    assert stand.engine.pipeline.granularity == 4
    assert stand.refactorings.history[-1].result is HandoverResult.DONE
    (event,) = stand.control.decided.since(0)
    assert event.message.startswith("2 -> 4 stages: load ")
    assert event.fields["numbers"]["load"] > 0.9
    assert event.fields["decided_s"] > 0


async def test_calm_traffic_keeps_and_says_why(stand: Stand) -> None:
    stand.ask(30, over_s=30)
    await stand.control.cycle()
    assert stand.control.last is not None
    assert stand.control.last["message"].startswith("keep: CV 0.00 (180 s), load ")
    assert stand.refactorings.history == ()


async def test_a_dry_run_decides_and_moves_nothing(stand: Stand) -> None:
    stand.control.set_mode(AutoMode.DRY_RUN)
    stand.ask(400, over_s=30)
    decision = await stand.control.cycle()
    assert decision is not None
    assert decision.verb is Verb.CHANGE
    assert (stand.engine.pipeline.granularity, stand.refactorings.under_way) == (2, None)
    stand.clock.now_s += 5
    again = await stand.control.cycle()
    assert again is not None
    assert again.verb is Verb.CHANGE


async def test_off_watches_and_decides_nothing(stand: Stand) -> None:
    stand.control.set_mode(AutoMode.OFF)
    stand.ask(400, over_s=30)
    assert await stand.control.cycle() is None
    assert stand.control.last is None
    assert stand.load.observe().queue_length == 0.0


async def test_an_operators_change_is_noticed_and_stays_for_its_dwell(stand: Stand) -> None:
    stand.ask(30, over_s=30)
    await stand.control.cycle()
    started = await stand.refactorings.start(Wanted(stages=4))
    assert isinstance(started, Started)
    assert (await stand.refactorings.ended(started)).stages_after == 4
    stand.clock.now_s += 2
    decision = await stand.control.cycle()
    assert decision is not None
    assert decision.verb is Verb.KEEP


async def test_another_cut_into_as_many_stages_is_noticed_too(stand: Stand) -> None:
    stand.ask(30, over_s=30)
    await stand.control.cycle()
    await stand.control.cycle()
    assert stand.load.observe().ttft_s == 0.0

    target = pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[7], num_decoders=8)
    async for _ in stand.engine.refactor(target):
        pass
    assert stand.engine.pipeline == target
    await stand.control.cycle()
    assert stand.load.observe().ttft_s is Absence.STALE  # what was measured was of the other cut
    stand.ask(1, over_s=1)
    await stand.control.cycle()
    assert stand.load.observe().ttft_s == 0.0


async def test_while_an_operator_changes_nothing_is_lost(stand: Stand) -> None:
    """A refactoring under way refuses the control loop's, which tries again later."""
    stand.ask(400, over_s=30)
    await stand.refactorings.start(Wanted(stages=8))
    await stand.control.cycle()
    await stand.settled()
    assert "not done: busy: handover #1" in stand.control.decided.since(0)[-1].message


async def test_no_engine_and_no_plan_are_reasons(stand: Stand) -> None:
    stand.given.error = NoFeasiblePlan("nothing fits")
    decision = await stand.control.cycle()
    assert decision is not None
    assert decision.reason == "keep: nothing fits"
    stand.is_there = False
    decision = await stand.control.cycle()
    assert decision is not None
    assert decision.reason == "keep: killed by a test"


async def test_a_refused_change_is_told_and_not_tried_again(stand: Stand) -> None:
    stand.given.candidates = (TWO, replace(FOUR, num_stages=64))
    stand.ask(400, over_s=30)
    await stand.control.cycle()
    await stand.settled()
    assert stand.control.decided.since(0)[-1].message.startswith("not done: ")
    stand.ask(100, over_s=5)
    decision = await stand.control.cycle()
    assert decision is not None
    assert decision.verb is Verb.KEEP


class Bed:
    """Sleeps when told so, unless somebody has come."""

    pipeline = even_pipeline(2)

    def __init__(self) -> None:
        self.is_asleep = False
        self.is_used = False
        self.reasons: list[str] = []

    def sleep(self, reason: str) -> bool:
        self.reasons.append(reason)
        self.is_asleep = not self.is_used
        return self.is_asleep

    def wake(self) -> None:
        self.is_asleep = False


async def test_nobody_for_long_makes_it_sleep_and_a_request_wakes_it(stand: Stand) -> None:
    stand.control = AutoControl(
        replace(SETTINGS, min_replicas=0, idle_s=60.0),
        engine=lambda: stand.engine,
        load=stand.load,
        candidates=stand.given,
        refactorings=stand.refactorings,
        rest=lambda: stand.bed,
        decided=EventLog(),
        clock=stand.clock,
    )
    stand.ask(30, over_s=30)
    await stand.control.cycle()
    stand.clock.now_s += 95
    stand.bed.is_used = True
    for is_asleep in (False, True):
        await stand.control.cycle()
        await stand.settled()
        assert stand.bed.is_asleep is is_asleep
        stand.bed.is_used = False
        stand.clock.now_s += 5
    assert stand.bed.reasons[-1].startswith("remove 1 replica of 2 stages: no request for ")
    decision = await stand.control.cycle()
    assert decision is not None
    assert decision.reason == "keep: asleep: no request waits"
    stand.load.arrived("first")
    stand.given.start_in_words = "ready in 4 s, as its parameters come from storage"  # they have gone since
    decision = await stand.control.cycle()
    assert decision is not None
    assert decision.reason.endswith(f"a request waits; {stand.given.start_in_words}")
    await stand.settled()
    assert not stand.bed.is_asleep


@dataclass(slots=True, kw_only=True)
class FleetStand:
    """Replicas of two stages, of which there may be three, and the control loop over them. A test gives candidates."""

    clock: Clock
    load: LoadSampler
    scale: ScaleStand
    control: AutoControl
    given: Given

    def ask(self, count: int, *, over_s: float) -> None:
        for index in range(count):
            self.clock.now_s += over_s / count
            self.load.arrived(index)
            self.load.first_token(index)
            self.load.ended(index, prompt_tokens=10, output_tokens=1, tpot_s=None)

    async def cycle(self) -> str:
        decision = await self.control.cycle()
        await until(lambda: self.control.is_settled)
        return "" if decision is None else decision.reason


S = TypeVar("S", bound=FleetStand)


@asynccontextmanager
async def controlled(kind: type[S], settings: AutoSettings, *candidates: Candidate, clock: Clock) -> AsyncIterator[S]:
    """A control loop over replicas, at first one of two stages; both end with the scope."""
    given, scale = Given(), ScaleStand()
    await scale.add(even_pipeline(2))
    given.candidates = candidates
    load = LoadSampler(clock=clock)
    control = AutoControl(
        settings,
        engine=lambda: scale.replicas.engines[0],
        load=load,
        candidates=given,
        refactorings=scale.refactorings,
        rest=lambda: scale.replicas,
        fleet=lambda: scale.fleet.serving,
        engines=lambda: scale.replicas.engines,
        decided=EventLog(),
        clock=clock,
    )
    yield kind(clock=clock, load=load, scale=scale, control=control, given=given)
    await control.close()
    await scale.refactorings.close()
    await scale.replicas.close()


@pytest.fixture
async def fleet_stand() -> AsyncIterator[FleetStand]:
    settings = replace(SETTINGS, max_replicas=3, reclaim_s=20.0)
    two, four = replace(TWO, most_replicas=3), replace(FOUR, most_replicas=1)
    async with controlled(FleetStand, settings, two, four, clock=Clock(100.0)) as stand:
        yield stand


async def test_overload_adds_replicas_and_calm_removes_them_again(fleet_stand: FleetStand) -> None:
    fleet_stand.ask(700, over_s=30)
    assert (await fleet_stand.cycle()).startswith("add ")
    assert fleet_stand.scale.fleet.serving == {1: 2, 2: 2, 3: 2}
    assert len(fleet_stand.scale.refactorings.history) == 1
    for _ in range(60):
        fleet_stand.clock.now_s += 10
        await fleet_stand.cycle()
    assert fleet_stand.scale.fleet.serving.keys() <= {1, 2, 3}
    assert list(fleet_stand.scale.fleet.serving.values()) == [2]
    removed = [each.message for each in fleet_stand.control.decided.since(0) if each.fields["verb"] == "remove"]
    assert len(removed) == 2
    assert all(each.endswith("% of what the others serve is asked for") for each in removed)


async def test_a_change_of_granularity_concerns_each_replica(fleet_stand: FleetStand) -> None:
    scale = fleet_stand.scale
    await scale.scaled(Wanted(replicas=2))
    ending = await fleet_stand.control.carried_out(Action(verb=Verb.CHANGE, num_stages=1, from_stages=2, count=2))
    assert ending == (Ending.DONE, scale.refactorings.history[-1].message)
    assert scale.fleet.serving == {1: 1, 2: 1}


async def test_what_there_is_no_room_for_is_told_and_not_done(fleet_stand: FleetStand) -> None:
    fleet_stand.scale.workshop.start_failures = ["no room"]
    fleet_stand.ask(700, over_s=30)
    await fleet_stand.cycle()
    assert fleet_stand.control.decided.since(0)[-1].message.startswith("not done: a replica of 2 stages on ")
    assert fleet_stand.scale.fleet.serving == {1: 2}


def test_settings_are_the_policys_constants() -> None:
    assert constants_of(AutoSettings()) == PolicyConstants()
