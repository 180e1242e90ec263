"""What the control loop says is what it does, and what it measures is of the layout in force."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from flexpiped.handover_records import Wanted
from flexpiped.refactoring import Started
from planner.arrivals import Absence
from tests.support.clock import Clock
from tests.support.until import until
from tests.unit.planner.policies import FOUR, TWO
from tests.unit.test_auto import SETTINGS, FleetStand, controlled


@dataclass(slots=True, kw_only=True)
class GivenStand(FleetStand):
    """Replicas of two stages that may sleep."""

    @property
    def last(self) -> str:
        return self.control.decided.since(0)[-1].message


@pytest.fixture
async def stand() -> AsyncIterator[GivenStand]:
    settings = replace(SETTINGS, min_replicas=0, max_replicas=3, idle_s=60.0)
    two, four = replace(TWO, most_replicas=3, start_s=8.0), replace(FOUR, start_s=2.0)
    async with controlled(GivenStand, settings, two, four, clock=Clock()) as stand:
        yield stand


async def test_latencies_of_the_layout_before_an_operators_change_do_not_count_for_the_new_one(
    stand: GivenStand,
) -> None:
    stand.ask(30, over_s=30)
    await stand.cycle()
    await stand.scale.scaled(Wanted(stages=4))
    assert stand.load.observe().ttft_s == 0.0
    await stand.cycle()
    assert stand.load.observe().ttft_s is Absence.STALE
    stand.ask(30, over_s=5)
    await stand.cycle()
    assert stand.load.observe().ttft_s == 0.0


async def test_what_was_not_begun_forgets_no_latency(stand: GivenStand) -> None:
    stand.scale.engine(0).hold_refactoring()
    started = await stand.scale.refactorings.start(Wanted(stages=8))
    assert isinstance(started, Started)
    stand.ask(700, over_s=30)
    await stand.cycle()
    assert stand.last.startswith("not done: busy: ")
    assert stand.load.observe().ttft_s == 0.0
    stand.scale.engine(0).release_refactoring()
    await stand.scale.refactorings.ended(started)


async def test_what_failed_forgets_no_latency_where_nothing_changed(stand: GivenStand) -> None:
    stand.scale.workshop.start_failures = ["no room"]
    stand.ask(700, over_s=30)
    await stand.cycle()
    assert stand.last.startswith("not done: a replica of 2 stages on ")
    assert stand.load.observe().ttft_s == 0.0


async def test_what_failed_after_it_had_begun_forgets_them(stand: GivenStand) -> None:
    """Of two replicas one came."""
    stand.scale.workshop.start_failures = [None, "no room"]
    stand.ask(700, over_s=30)
    await stand.cycle()
    assert "did not start: no room; 2 replicas serve" in stand.last
    assert stand.load.observe().ttft_s is Absence.STALE


async def test_a_wake_is_decided_for_what_sleeps_also_where_something_else_would_start_sooner(
    stand: GivenStand,
) -> None:
    stand.ask(30, over_s=30)
    await stand.cycle()
    stand.clock.now_s += 95
    await stand.cycle()
    assert stand.scale.replicas.is_asleep
    stand.load.arrived("first")
    assert (await stand.cycle()).startswith("add 1 replica of 2 stages: a request waits")
    await until(lambda: stand.scale.replicas.engine is not None)
    assert stand.scale.fleet.serving == {1: 2}
