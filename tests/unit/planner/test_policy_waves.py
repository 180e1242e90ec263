"""Traffic that swings around each threshold of the policy: never more than two changes a minute, a wake excepted.

The swings around thresholds of load with the defaults are in ``test_policy.py``.
"""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.granularity import scores
from planner.load import WINDOWS_S
from planner.policy_state import PolicyConstants
from planner.scaling import wanted_instances
from planner.simulation.outcome import most_in_a_minute
from planner.workload import Slo
from tests.unit.planner.policies import THREE, Run, square_wave

CONSTANTS = PolicyConstants()
MOST = 8
MANY = replace(CONSTANTS, max_replicas=MOST)
STARTS_S = (8.0, 4.0, 2.0)
FLEET = tuple(replace(each, most_replicas=MOST, start_s=s) for each, s in zip(THREE, STARTS_S, strict=True))
UNTIL_S = 1200.0
SEEDS = pytest.mark.parametrize("seed", range(5))


def cvs_of_change() -> list[float]:
    """Return the CVs at which another granularity begins to score best, and at which it scores better by the least
    gain that a change must bring, on the way up and on the way down."""
    found = []
    for finer in (1, 2):
        for ratio in (1 / (1 + CONSTANTS.min_gain), 1.0, 1 + CONSTANTS.min_gain):
            found += [cv / 100 for cv in range(1, 1200) if gain(cv / 100, finer) <= ratio < gain((cv + 1) / 100, finer)]
    return found


def gain(cv: float, finer: int) -> float:
    """Return how much better a granularity scores than the next coarser one."""
    found = scores(THREE, cv=cv, constants=CONSTANTS.score)
    return found[finer] / found[finer - 1]


def queues_of_change() -> list[int]:
    """Return the queues from which on Eq 11 asks for one replica more than before, of at most ``MOST``, at CV 1."""
    asked = [wanted_instances(most=MOST, cv=1.0, queue_length=each, constants=CONSTANTS.scale) for each in range(80)]
    return [queue for queue in range(1, 80) if asked[queue] != asked[queue - 1]]


def gamma_wave(random: Random, *, cv: float, share: float, period_s: float, rate_per_s: float) -> Iterator[float]:
    """Yield arrivals whose CV is a share below ``cv`` for half a period, then as much above."""
    now_s = 0.0
    while now_s < UNTIL_S:
        of_now = cv * (1 + share if now_s % period_s >= period_s / 2 else 1 - share)
        now_s += random.gammavariate(1 / of_now**2, of_now**2 / rate_per_s)
        yield now_s


def most_but_wakes(run: Run) -> int:
    begun = [each for each in run.decisions if each.action is not None]
    return most_in_a_minute([each.at_s for each in begun if "a request waits" not in each.reason])


@SEEDS
@pytest.mark.parametrize("fleet", [(2,), (8,)])
def test_around_the_most_that_the_finest_layout_takes(seed: int, fleet: tuple[int, ...]) -> None:
    """90 % of what 8 stages serve: beyond it nothing serves more, and below it nothing else would do."""
    random, most_per_s = Random(seed), CONSTANTS.load_limit * THREE[2].throughput_per_s
    share, period_s = random.uniform(0.01, 0.2), random.uniform(10.0, 400.0)
    low, high = most_per_s * (1 - share), most_per_s * (1 + share)
    run = Run(CONSTANTS, fleet=fleet)

    waves = square_wave(low_per_s=low, high_per_s=high, period_s=period_s, until_s=UNTIL_S)
    state = run.through(waves, until_s=UNTIL_S)

    assert state.fleet == (8,)
    assert len(run.actions) == (fleet == (2,))


@SEEDS
@pytest.mark.parametrize("rate_per_s", [2.0, 6.0])
@pytest.mark.parametrize("cv", cvs_of_change())
def test_around_each_cv_at_which_another_granularity_scores_best(cv: float, rate_per_s: float, seed: int) -> None:
    random = Random(seed)
    share, period_s = random.uniform(0.01, 0.3), random.uniform(20.0, 600.0)
    run = Run(CONSTANTS)

    run.through(gamma_wave(random, cv=cv, share=share, period_s=period_s, rate_per_s=rate_per_s), until_s=UNTIL_S)

    assert run.most_in_a_minute <= 2
    assert len(run.actions) <= UNTIL_S / CONSTANTS.dwell_s


@SEEDS
@pytest.mark.parametrize("queue", queues_of_change())
def test_around_each_queue_at_which_eq_11_asks_for_one_replica_more(queue: int, seed: int) -> None:
    random = Random(seed)
    swing, period_s = random.randint(1, 4), random.uniform(10.0, 400.0)

    def waiting(now_s: float) -> int:
        return max(0, queue + (swing if now_s % period_s >= period_s / 2 else -swing))

    run = Run(MANY, candidates=FLEET, queue=waiting)
    state = run.through(gamma_wave(random, cv=1.0, share=0.0, period_s=period_s, rate_per_s=4.0), until_s=UNTIL_S)

    assert run.most_in_a_minute <= 2
    assert len(run.actions) <= 2 * MOST  # they come one after the other, and none goes while anybody waits
    assert 1 < len(state.fleet) <= MOST


@SEEDS
@pytest.mark.parametrize("idle_s", [20.0, 60.0, 300.0])
def test_around_the_pause_after_which_all_replicas_go(idle_s: float, seed: int) -> None:
    """A few requests, then nobody for a little less or more than the pause, again and again.

    It begins when the last one has left the shortest window.
    """
    random = Random(seed)
    arrivals_s, now_s = list[float](), 0.0
    while now_s < 10 * UNTIL_S:
        arrivals_s += [now_s + index for index in range(5)]
        now_s += 5 + (WINDOWS_S[0] + idle_s) * random.uniform(0.8, 1.2)
    run = Run(replace(MANY, min_replicas=0, idle_s=idle_s), candidates=FLEET)

    run.through(arrivals_s, until_s=arrivals_s[-1])

    slept = sum("no request for" in each.reason for each in run.decisions if each.action is not None)
    assert slept > 0
    assert most_but_wakes(run) <= 2
    assert len(run.actions) <= 3 * (slept + 1)  # a sleep, a wake with what starts soonest, and back to what scores best


@settings(max_examples=20, deadline=None)
@given(
    low=st.floats(0.001, 2.0),
    high=st.floats(0.2, 60.0),
    period_s=st.floats(10.0, 600.0),
    idle_s=st.sampled_from([5.0, 30.0, 120.0]),
    queue=st.sampled_from([0, 0, 8, 40]),
)
def test_whatever_comes_where_all_replicas_may_go(
    low: float, high: float, period_s: float, idle_s: float, queue: int
) -> None:
    """Also with cool-down, confirmation and reclamation far shorter than the defaults."""
    hasty = replace(
        MANY, min_replicas=0, idle_s=idle_s, dwell_s=5.0, cool_down_s=1.0, confirm_s=0.0, guard_s=5.0, reclaim_s=0.0
    )
    run = Run(hasty, candidates=FLEET, queue=lambda now_s: queue if now_s % 60 < 20 else 0, slo=Slo(ttft_s=0.5))

    waves = square_wave(low_per_s=low, high_per_s=high, period_s=period_s, until_s=600)
    run.through(waves, until_s=600, interval_s=2.5)

    assert most_but_wakes(run) <= 2
