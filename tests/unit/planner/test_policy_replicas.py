"""The policy through virtual time where there may be several replicas, or none: when they come and when they go."""

from dataclasses import replace

import pytest

from planner.policy_state import Action, PolicyConstants, Verb
from planner.start_times import Origin, StartRecord, expected_start
from planner.workload import Slo
from tests.unit.planner.policies import THREE, Run, steady

WORDS = ("instead of", "a request waits")
MANY = replace(PolicyConstants(), min_replicas=0, max_replicas=8)
FLEET = tuple(replace(each, most_replicas=8, start_s=start) for each, start in zip(THREE, (8.0, 4.0, 2.0), strict=True))


def test_overload_adds_replicas_and_a_lasting_surplus_removes_them_one_by_one() -> None:
    run = Run(MANY, candidates=(FLEET[0],))
    waves = [*steady(5.0, 100), *(100 + s for s in steady(30.0, 300)), *(400 + s for s in steady(5.0, 2600))]
    state = run.through(waves, until_s=3000)
    assert run.actions[0][1].verb is Verb.ADD
    assert any(len(each.numbers["fleet"].split(",")) >= 4 for each in run.decisions)  # type: ignore[union-attr]
    assert state.fleet == (2,)
    removed = [at_s for at_s, action in run.actions if action.verb is Verb.REMOVE]
    assert removed[0] >= 400 + MANY.reclaim_s


def test_sleep_at_zero_traffic_and_wake_at_the_first_request() -> None:
    run = Run(MANY, candidates=FLEET)
    run.through([*steady(2.0, 100), 1000.0], until_s=1100)
    verbs = [(at_s, action.verb, action.num_stages) for at_s, action in run.actions]
    assert verbs[0][1] is Verb.REMOVE
    assert verbs[0][0] >= 100 + MANY.idle_s
    assert verbs[1] == (1000.0, Verb.ADD, 8)  # what starts soonest
    assert any(each.reason == "keep: asleep: no request waits" for each in run.decisions)
    assert any(each.reason.endswith(": a request waits; ready in 2 s") for each in run.decisions)


@pytest.mark.parametrize(("trial_s", "is_late"), [(None, False), (6.0, True)])
def test_a_wake_that_ends_too_late_says_so_and_what_the_first_request_compiles_counts(
    trial_s: float | None, is_late: bool
) -> None:
    taken = (StartRecord(num_stages=2, origin=Origin.KEPT, took_s=25.0, trial_s=trial_s),)
    start = expected_start(taken, num_stages=2, origin=Origin.KEPT)
    assert start is not None
    slow = replace(FLEET[0], start_s=start.took_s, start_in_words=start.in_words)
    run = Run(MANY, candidates=(slow,))
    run.through([*steady(2.0, 100), 1000.0], until_s=1100)
    [woken] = [each.reason for each in run.decisions if "a request waits" in each.reason and each.action]
    assert f"ready in {25 + (trial_s or 0):g} s" in woken
    assert woken.endswith("later than the 30 s within which it should be served") is is_late


def test_a_replica_that_comes_says_where_its_parameters_are_and_how_soon_it_is_ready() -> None:
    kept = "ready in 8 s, as its parameters are kept in host memory (30 s from storage)"
    run = Run(MANY, candidates=(replace(FLEET[0], start_in_words=kept),))
    run.through([*steady(5.0, 100), *(100 + s for s in steady(30.0, 200)), 2000.0], until_s=2100)
    [added, *_], woken = ([each for each in run.decisions if word in each.reason and each.action] for word in WORDS)
    assert added.reason.endswith(f"; each {kept}, one after the other")
    assert added.numbers["start_s"] == 8.0
    assert woken[-1].reason.endswith(f": a request waits; {kept}")


def test_a_queue_that_coarse_replicas_would_serve_too_late_gets_fine_ones() -> None:
    slow, quick = replace(FLEET[0], start_s=60.0), replace(FLEET[2], start_s=2.0)
    run = Run(MANY, candidates=(slow, quick), queue=64)
    run.through(steady(8.0, 60), until_s=20)
    _at_s, action = run.actions[0]
    assert (action.verb, action.num_stages) == (Verb.ADD, 8)


def test_several_replicas_count_one_after_the_other_where_they_have_to_be_in_time() -> None:
    """Three of two stages would serve 600 requests in 30 s if all were there after 12 s, which only the first is."""
    slow, quick = replace(FLEET[0], start_s=12.0, start_in_words="ready in 12 s"), replace(FLEET[2], start_s=2.0)
    few, many = Run(MANY, candidates=(slow, quick), queue=400), Run(MANY, candidates=(slow, quick), queue=600)
    for run in (few, many):
        run.through(steady(30.0, 60), until_s=20)
    chosen = [(action.verb, action.num_stages, action.count) for run in (few, many) for _, action in run.actions[:1]]
    assert chosen == [(Verb.ADD, 2, 3), (Verb.ADD, 8, 3)]
    [told] = [each.reason for each in few.decisions if each.action][:1]
    assert told.endswith("; each ready in 12 s, one after the other")


LATE = Slo(ttft_s=1.0)


def test_late_requests_get_one_more_replica_below_the_limit_of_load_and_none_goes_while_they_are() -> None:
    run = Run(MANY, candidates=(FLEET[0],), latency_s=lambda _stages: 2.0, slo=LATE)
    state = run.through(steady(7.0, 120), until_s=120)
    assert [(action.verb, action.count) for _at_s, action in run.actions][:2] == [(Verb.ADD, 1)] * 2
    assert state.fleet == (2, 2, 2)  # with a third replica hardly any of them is loaded
    assert run.actions[0][0] >= MANY.confirm_s
    assert any("100% of the requests are late" in each.reason for each in run.decisions)


def test_who_would_be_late_anyway_gets_no_further_replica() -> None:
    run = Run(MANY, candidates=(FLEET[0],), latency_s=lambda _stages: 2.0, slo=LATE)
    run.through(steady(1.0, 120), until_s=120)
    assert run.actions == []


def test_a_queue_that_makes_nobody_late_asks_for_nothing_and_keeps_no_replica() -> None:
    asked = Run(MANY, candidates=(FLEET[0],), fleet=(2, 2), latency_s=lambda _stages: 0.5, queue=32, slo=LATE)
    state = asked.through(steady(3.0, 600), until_s=600)
    assert [action.verb for _at_s, action in asked.actions] == [Verb.REMOVE]
    assert state.fleet == (2,)


@pytest.mark.parametrize(("queue", "added"), [(0, []), (9, [1]), (64, [1])])
def test_a_queue_alone_asks_for_replicas_without_overload_and_without_targets(queue: int, added: list[int]) -> None:
    """Eq 11: of the 8 that there may be, evenly spaced requests that wait ask for 30 %, however many they are."""
    run = Run(MANY, candidates=(FLEET[0],), queue=queue)
    run.through(steady(2.0, 60), until_s=60)
    assert [action.count for _at_s, action in run.actions if action.verb is Verb.ADD] == added
    reasons = [each.reason for each in run.decisions if each.action]
    assert all(f"2 replicas instead of 1: {queue} requests wait, CV 0.00" in each for each in reasons)
    assert max(float(each.numbers["load"]) for each in run.decisions) < 0.3


def test_where_no_more_of_what_serves_fits_finer_replicas_come() -> None:
    full, finer = replace(FLEET[0], most_replicas=2, room=0), replace(FLEET[1], room=1)
    run = Run(MANY, candidates=(full, finer), fleet=(2, 2))
    state = run.through(steady(30.0, 60), until_s=60)
    assert run.actions[0][1] == Action(verb=Verb.ADD, num_stages=4)
    assert state.fleet[:2] == (2, 2)
