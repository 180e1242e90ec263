"""How often the policy acts: dwell, cool-down, the limit of a minute, and when what failed is tried again."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.policy import initial_state, settle
from planner.policy_state import Action, Barred, Decision, Ending, PolicyConstants, Verb
from planner.workload import Slo
from tests.unit.planner.policies import FOUR, THREE, TWO, Run

CONSTANTS = PolicyConstants()
HASTY = replace(CONSTANTS, confirm_s=0.0)
SEVERAL = replace(HASTY, min_replicas=0, max_replicas=8)
PAIR = replace(TWO, most_replicas=8)
QUARTET = replace(FOUR, most_replicas=8)


def steady(rate_per_s: float, *, begin_s: float = 0.0, until_s: float) -> Iterable[float]:
    count = int((until_s - begin_s) * rate_per_s)
    return [begin_s + (index + 1) / rate_per_s for index in range(count)]


def bursts(*, until_s: float) -> Iterable[float]:
    """16 requests at once, every 4 s: four stages are clearly better, and two are not overloaded."""
    return [at_s + index * 1e-3 for at_s in range(4, int(until_s), 4) for index in range(16)]


def reasons(run: Run) -> dict[float, str]:
    return {each.at_s: each.reason for each in run.decisions}


def failing(verb: Verb, *, with_stages: int | None = None) -> Callable[[Action], Ending]:
    """Return an ending by which actions of one kind fail, and all others are done."""

    def ending(action: Action) -> Ending:
        is_meant = action.verb is verb and with_stages in (None, action.num_stages)
        return Ending.FAILED if is_meant else Ending.DONE

    return ending


# --- dwell ---


def test_a_better_layout_waits_until_the_one_in_force_has_stayed_for_its_dwell() -> None:
    run = Run(HASTY, candidates=(TWO, FOUR))
    run.through(bursts(until_s=80), until_s=80)
    for at_s in range(10, 60, 5):
        left = f"this layout stays for {60 - at_s} s more at least"
        assert reasons(run)[at_s] == f"keep: 4 stages would be better; {left}"
    assert run.actions == [(60.0, Action(verb=Verb.CHANGE, num_stages=4, from_stages=2))]


def test_after_the_dwell_it_has_to_look_right_for_a_while_too() -> None:
    run = Run(CONSTANTS, candidates=(TWO, FOUR))
    run.through(bursts(until_s=80), until_s=80)
    assert reasons(run)[65.0].endswith("; looked right for 5 of 10 s")
    assert [at_s for at_s, _action in run.actions] == [70.0]


def test_how_long_a_change_is_taken_to_pay_is_learnt_from_the_dwells_seen() -> None:
    run = Run(HASTY, candidates=(TWO, FOUR))
    state = run.through([*bursts(until_s=300), *steady(2.0, begin_s=300, until_s=900)], until_s=900)
    there, back = (each for each in run.decisions if each.verb is Verb.CHANGE)
    assert there.numbers["expected_dwell_s"] == CONSTANTS.expected_dwell_s  # none was seen
    first_s = there.at_s + run.action_s
    assert back.numbers["expected_dwell_s"] == first_s
    assert state.dwell_s == pytest.approx((first_s + (back.at_s - there.at_s)) / 2)


# --- cool-down ---


def test_a_second_action_within_the_cool_down_is_refused() -> None:
    run = Run(
        replace(SEVERAL, cool_down_s=30.0),
        candidates=(PAIR,),
        latency_s=lambda _stages: 2.0,
        slo=Slo(ttft_s=1.0),  # all are late, so each look asks for one more
        action_s=1.0,
    )
    run.through(steady(7.0, until_s=60), until_s=60)
    assert [(at_s, action.verb) for at_s, action in run.actions] == [(5.0, Verb.ADD), (40.0, Verb.ADD)]
    for at_s in range(10, 40, 5):
        assert reasons(run)[at_s] == f"keep: cooling down for {36 - at_s} s after the last change"


# --- the limit of a minute, and the wake that stands before it ---


def test_a_wake_may_be_the_third_action_of_a_minute_and_counts_for_what_follows() -> None:
    """A surplus replica goes, then the last one for want of requests; then one comes, and many after it."""
    run = Run(
        replace(SEVERAL, reclaim_s=10.0, idle_s=20.0, cool_down_s=1.0),
        candidates=(PAIR,),
        fleet=(2, 2),
    )
    run.through([1.0, *steady(12.0, begin_s=56.0, until_s=120)], until_s=120)
    acted = [(at_s, action.verb) for at_s, action in run.actions]
    assert acted == [(15.0, Verb.REMOVE), (50.0, Verb.REMOVE), (60.0, Verb.ADD), (110.0, Verb.ADD)]
    assert [each.at_s for each in run.beyond(2)] == [60.0]
    assert reasons(run)[65.0] == "keep: 3 changes in the last minute, as many as there may be"
    assert reasons(run)[105.0] == "keep: 2 changes in the last minute, as many as there may be"


def is_wake(decision: Decision) -> bool:
    return decision.verb is Verb.ADD and decision.numbers["fleet"] == ""


@settings(max_examples=30, deadline=None)
@given(gaps_s=st.lists(st.sampled_from([0.02, 0.05, 0.5, 11.0, 25.0]), min_size=4, max_size=60), honest=st.booleans())
def test_nothing_but_a_wake_goes_beyond_two_actions_a_minute(gaps_s: list[float], honest: bool) -> None:
    hasty = replace(SEVERAL, dwell_s=5.0, cool_down_s=1.0, guard_s=5.0, reclaim_s=5.0, idle_s=10.0, max_replicas=3)
    arrivals_s, now_s = [], 0.0
    for gap_s in gaps_s:
        now_s += gap_s
        arrivals_s += [now_s + index * 0.05 for index in range(20)]
        now_s += 1.0
    run = Run(
        hasty,
        candidates=tuple(replace(each, most_replicas=3) for each in THREE),
        fleet=(2, 2),
        latency_s=None if honest else lambda stages: 0.2 * stages,
        slo=Slo(ttft_s=0.5),
    )
    run.through(arrivals_s, until_s=now_s + 60, interval_s=2.5)
    assert all(is_wake(each) for each in run.beyond(2))


# --- what failed ---


@pytest.mark.parametrize("first", [Ending.FAILED, Ending.BUSY])
def test_an_undo_that_was_not_done_is_judged_again_until_it_is(first: Ending) -> None:
    """Somebody else's change, or a rollback, keeps the worse layout for a while; it is not forgotten."""
    endings = [first, first]

    def ending(action: Action) -> Ending:
        return endings.pop() if action.verb is Verb.UNDO and endings else Ending.DONE

    run = Run(CONSTANTS, candidates=(TWO, FOUR), latency_s=lambda stages: 0.2 if stages == 2 else 3.0, ending=ending)
    state = run.through(bursts(until_s=600), until_s=600)
    assert [action.verb for _at_s, action in run.actions] == [Verb.CHANGE, Verb.UNDO, Verb.UNDO, Verb.UNDO]
    undone_s = [at_s for at_s, action in run.actions if action.verb is Verb.UNDO]
    waits_s = [later - earlier for earlier, later in pairwise(undone_s)]
    expected_s = [60, 120] if first is Ending.FAILED else [30, 30]
    assert waits_s == pytest.approx(expected_s, abs=run.action_s + 5)
    assert (state.main, state.watch) == (2, None)
    assert [(each.verb, each.num_stages) for each in state.barred] == [(Verb.CHANGE, 4)]


def test_a_replica_that_does_not_start_is_tried_again_after_a_growing_while() -> None:
    run = Run(SEVERAL, candidates=(PAIR,), ending=failing(Verb.ADD))
    state = run.through(steady(12.0, until_s=900), until_s=900)
    times_s = [at_s for at_s, _action in run.actions]
    assert {action.verb for _at_s, action in run.actions} == {Verb.ADD}
    waits_s = [later - earlier for earlier, later in pairwise(times_s)]
    assert waits_s == pytest.approx([60, 120, 240], abs=run.action_s + 5)
    assert state.fleet == (2,)
    soon = reasons(run)[times_s[0] + 20]
    assert soon == (
        "keep: load 120%, and nothing serves more than 2 stages; "
        "a replica of 2 stages failed, and is tried again in 40 s at the earliest"
    )


def test_meanwhile_replicas_of_another_granularity_come() -> None:
    run = Run(SEVERAL, candidates=(PAIR, QUARTET), ending=failing(Verb.ADD, with_stages=2))
    state = run.through(steady(12.0, until_s=60), until_s=60)
    assert [(action.verb, action.num_stages) for _at_s, action in run.actions] == [(Verb.ADD, 2), (Verb.ADD, 4)]
    assert state.fleet == (2, 4)
    [came] = [each.reason for each in run.decisions if each.action and each.action.num_stages == 4]
    assert "; a replica of 2 stages failed, and is tried again in " in came


def test_one_that_starts_ends_that_and_bars_nothing_else() -> None:
    state = initial_state([2], now_s=0.0)
    add = Action(verb=Verb.ADD, num_stages=2)
    for times in (1, 2, 3):
        state = settle(replace(state, under_way=add), now_s=0.0, fleet=[2], ending=Ending.FAILED, constants=CONSTANTS)
        until_s = CONSTANTS.add_again_s * 2 ** (times - 1)
        assert state.barred == (Barred(verb=Verb.ADD, num_stages=2, until_s=until_s, times=times),)
    other = Barred(verb=Verb.CHANGE, num_stages=2, until_s=9.0, times=1)
    state = replace(state, under_way=add, barred=(*state.barred, other))
    done = settle(state, now_s=0.0, fleet=[2, 2], ending=Ending.DONE, constants=CONSTANTS)
    assert done.barred == (other,)
