"""What a simulation costs follows from what happens: time in which nobody comes is jumped over, and changes nothing."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from planner.errors import InvalidTrace
from planner.load import Observation
from planner.policy import initial_state
from planner.policy_rest import rests_until_s
from planner.policy_state import Action, Barred, PolicyConstants, PolicyState, Verb, Watch, Wish
from planner.simulation import run
from planner.simulation.baselines import FastColdStart, Oracle, Static
from planner.simulation.fleet import Fleet
from planner.simulation.outcome import Outcome
from planner.simulation.outlooks import Outlooks
from planner.simulation.run import MemoryChange, Setting, simulate
from planner.simulation.system import System
from planner.traces import Trace, drawn_trace
from tests.unit.simulation.test_run import CALM, SETTING, SHAPES, SLO, own, pool

DAY_S = 86_400.0


@dataclass(kw_only=True)
class Restless:
    """Another system, asked at every interval."""

    system: System
    looks: int = 0

    def begin(self, fleet: Fleet) -> None:
        self.system.begin(fleet)

    def tick(self, observation: Observation, now_s: float) -> str:
        self.looks += 1
        return self.system.tick(observation, now_s)

    def rests_until_s(self, observation: Observation, now_s: float, *, next_s: float) -> float:  # noqa: ARG002
        return now_s


@dataclass(kw_only=True)
class Counted(Restless):
    """Another system, and how often it was asked."""

    def rests_until_s(self, observation: Observation, now_s: float, *, next_s: float) -> float:
        return self.system.rests_until_s(observation, now_s, next_s=next_s)


def two_bursts(*, apart_s: float) -> Trace:
    burst = drawn_trace(replace(CALM, rate_per_s=25.0), duration_s=60.0, seed=2)
    return (*burst, *(replace(each, arrival_s=each.arrival_s + apart_s) for each in burst[:500]))


def systems(trace: Trace) -> dict[str, System]:
    outlooks, arrivals_s = Outlooks(SHAPES, SLO), [each.arrival_s for each in trace]
    return {
        "own": own(reclaim_s=60.0),
        "own, to nothing": own(min_replicas=0, reclaim_s=60.0, idle_s=200.0),
        "static": Static(num_stages=4, replicas=2),
        "cold start": FastColdStart(num_stages=4, per_replica=20),
        "oracle": Oracle(outlooks=outlooks, expected=CALM, arrivals_s=arrivals_s),
    }


def happened(outcome: Outcome) -> object:
    """Return all of an outcome but how often was looked."""
    seen = [(each.at_s, each.replicas) for each in outcome.samples]
    changed = [now for before, now in pairwise(seen) if before[1] != now[1]]
    return replace(outcome, samples=(), queue_mean=pytest.approx(outcome.queue_mean)), changed  # type: ignore[arg-type]


@pytest.mark.parametrize("name", systems(()))
def test_jumping_over_time_in_which_nobody_comes_changes_nothing(name: str) -> None:
    trace = two_bursts(apart_s=4 * 3600.0)
    taken = MemoryChange(at_s=9_000.0, device=0, num_bytes=70 * 10**9)
    setting = replace(SETTING, trace=trace, memory_changes=(taken, replace(taken, at_s=9_100.0, num_bytes=-(10**10))))
    jumping, restless = (kind(system=systems(trace)[name]) for kind in (Counted, Restless))

    assert happened(simulate(setting, pool(), jumping)) == happened(simulate(setting, pool(), restless))
    assert restless.looks > 2880
    assert jumping.looks < 1300


def test_months_without_anybody_cost_no_more_than_hours() -> None:
    looks = []
    for apart_s in (DAY_S, 300 * DAY_S):
        system = Counted(system=own(min_replicas=0, idle_s=200.0))
        outcome = simulate(replace(SETTING, trace=two_bursts(apart_s=apart_s)), pool(), system)
        assert outcome.figures.failed == 0
        assert outcome.simulated_s > apart_s
        looks.append(system.looks)
    assert looks[0] == pytest.approx(looks[1], abs=2)


def test_progress_is_told_at_every_look_and_ends_at_the_last_arrival() -> None:
    told: list[tuple[float, float]] = []
    trace = two_bursts(apart_s=DAY_S)
    simulate(replace(SETTING, trace=trace), pool(), own(), on_progress=lambda now_s, end_s: told.append((now_s, end_s)))
    assert [now_s for now_s, _ in told] == sorted(now_s for now_s, _ in told)
    assert set(told[-1]) == {trace[-1].arrival_s}


def sparse(count: int, *, every_s: float) -> Setting:
    """Return somebody now and then, over and over."""
    return replace(SETTING, trace=tuple(replace(SETTING.trace[0], arrival_s=every_s * n) for n in range(count)))


def test_more_looks_than_there_may_be_are_refused_before_the_first() -> None:
    with pytest.raises(InvalidTrace, match=r"^63\.8 days with arrivals in them are 1,101,600 looks of 5 s: at most 1,"):
        simulate(sparse(3061, every_s=1800.0), pool(), Static(num_stages=4, replicas=1))


def test_who_waits_for_ever_is_not_simulated_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no replica ever fits, a request waits, and nobody can say that nothing will happen."""
    monkeypatch.setattr(run, "MOST_LOOKS", 500)
    with pytest.raises(InvalidTrace, match=r"after 500 looks: 1 request had come and not ended by then"):
        simulate(sparse(2, every_s=DAY_S), pool(devices=1), Static(num_stages=4, replicas=1))


CONSTANTS = PolicyConstants(min_replicas=0, max_replicas=4)
CHANGE = Action(verb=Verb.CHANGE, num_stages=4, from_stages=2)


@pytest.mark.parametrize(
    ("change", "until_s"),
    [
        ({}, 9999.0),
        ({"busy_s": 900.0}, 1200.0),  # then it is idle
        ({"ended_s": 990.0}, 1005.0),  # cooled down
        ({"changes_s": (950.0, 990.0)}, 1010.0),  # a change may be made again
        ({"since_s": 970.0}, 1030.0),  # it has stayed for its dwell
        ({"barred": (Barred(verb=Verb.ADD, num_stages=2, until_s=1500.0, times=3),)}, 1500.0),
        ({"under_way": CHANGE}, 1000.0),
        ({"wish": Wish(action=CHANGE, since_s=990.0)}, 1000.0),
        ({"watch": Watch(action=CHANGE, due_s=2000.0, bias=None)}, 1000.0),
    ],
)
def test_the_policy_rests_until_a_rule_that_waits_for_time_may_say_something_else(
    change: dict[str, object], until_s: float
) -> None:
    state: PolicyState = replace(initial_state((2,), now_s=0.0), **change)  # type: ignore[arg-type]
    assert rests_until_s(state, now_s=1000.0, next_s=9999.0, constants=CONSTANTS) == until_s
