"""What a change is held to: the queue that was there, and who came, as well as what is predicted of all traffic."""

from dataclasses import replace

import pytest

from planner.guard import SinceChange, latency_in_queue_s
from planner.load import EngineSample, LoadMonitor
from planner.policy import decide, initial_state, settle
from planner.policy_state import Action, Decision, Ending, PolicyConstants, PolicyState, Verb
from tests.unit.planner.policies import candidate

CONSTANTS = PolicyConstants(guard_s=7.0)
ONE = candidate(1, throughput_per_s=4.0, latency_s=0.4, best_cv=0.5)
TWO = candidate(2, throughput_per_s=8.0, latency_s=0.5, best_cv=0.5)
CHANGE = Action(verb=Verb.CHANGE, num_stages=2, from_stages=1)
CHANGED_S = 100.0


def test_a_queue_that_was_there_delays_who_comes_until_it_is_worked_off() -> None:
    """8 requests at 4 a second are gone after 2 s; at 2 a second after 4 s."""
    since = SinceChange(at_s=10.0, inherited=8.0, came_s=(11.0, 13.0))
    assert latency_in_queue_s(since, served_per_s=4.0, alone_s=0.1) == pytest.approx((5 / 4 + 1 / 4) / 2)
    assert latency_in_queue_s(since, served_per_s=2.0, alone_s=0.1) == pytest.approx((7 / 2 + 4 / 2) / 2)


def test_nobody_takes_less_than_alone() -> None:
    calm = SinceChange(at_s=0.0, came_s=(1.0, 5.0, 9.0))
    assert latency_in_queue_s(calm, served_per_s=10.0, alone_s=0.7) == pytest.approx(0.7)
    assert latency_in_queue_s(SinceChange(at_s=0.0, inherited=50.0), served_per_s=10.0, alone_s=0.7) == 0.7


def test_a_burst_counts_as_the_queue_that_it_is() -> None:
    burst = SinceChange(at_s=0.0, came_s=(1.0,) * 4)
    assert latency_in_queue_s(burst, served_per_s=2.0, alone_s=0.1) == pytest.approx((0.5 + 1 + 1.5 + 2) / 4)


def judged(*, served_per_s: float, alone_s: float, inherited: int) -> tuple[PolicyState, Decision]:
    """Return what is decided of a change from one stage to two that was done with so many requests waiting.

    2 requests a second come before and after it; in truth two stages serve ``served_per_s``, first come first served.
    """
    monitor = LoadMonitor(began_s=0.0)
    came = [0.5 * number for number in range(200)] + [CHANGED_S - 0.1] * inherited
    came += [CHANGED_S + 0.5 * number for number in range(1, 14)]
    free_s = CHANGED_S
    for number, came_s in enumerate(came):
        if number == 200 + inherited:
            monitor.layout_changed(CHANGED_S)
        monitor.arrived(number, came_s)
        if number < 200:
            monitor.ended(number, came_s + 0.4, output_tokens=1)
    for number, came_s in list(enumerate(came))[200:]:
        free_s = max(free_s, came_s) + 1 / served_per_s
        monitor.first_token(number, max(free_s, came_s + alone_s))
        monitor.ended(number, max(free_s, came_s + alone_s), output_tokens=1)
    now_s = CHANGED_S + CONSTANTS.guard_s
    monitor.sampled(now_s, EngineSample(running=0, waiting=0, kv_use=0.1))
    state = replace(initial_state([1], now_s=0.0), under_way=CHANGE, bias=1.0)
    state = settle(state, now_s=CHANGED_S, fleet=[2], ending=Ending.DONE, constants=CONSTANTS)
    return decide(state, monitor.observe(now_s), (ONE, TWO), now_s, CONSTANTS)


def test_a_backlog_from_before_does_not_undo_a_change_that_serves_as_predicted() -> None:
    state, decision = judged(served_per_s=8.0, alone_s=0.5, inherited=30)
    assert decision.verb is Verb.KEEP
    assert "2 stages pay" in decision.reason
    assert float(decision.numbers["predicted_s"]) > 1.4  # of the traffic alone it would be 0.7 s
    assert float(decision.numbers["old_predicted_s"]) > float(decision.numbers["predicted_s"])
    assert state.watch is None


def test_a_change_that_serves_less_than_the_old_layout_is_undone_for_all_its_backlog() -> None:
    state, decision = judged(served_per_s=2.5, alone_s=0.5, inherited=30)
    assert decision.verb is Verb.UNDO
    assert state.under_way == Action(verb=Verb.UNDO, num_stages=1, from_stages=2)


def test_a_change_that_makes_calm_requests_slow_is_undone() -> None:
    _, decision = judged(served_per_s=8.0, alone_s=1.5, inherited=0)
    assert decision.verb is Verb.UNDO


def test_a_full_layout_does_not_darken_what_is_expected_of_the_next() -> None:
    """At 95 % of its capacity one stage is expected to take 8 s a request for ever; in the burst's first seconds it
    takes 1 s. That predictions are eight times too high is not to be learnt from that."""
    monitor, state = LoadMonitor(began_s=0.0), initial_state([1], now_s=0.0)
    constants = replace(CONSTANTS, confirm_s=0.0)
    for number in range(400):
        came_s = number / 3.8
        monitor.arrived(number, came_s)
        monitor.first_token(number, came_s + 1.0)
        monitor.ended(number, came_s + 1.0, output_tokens=1)
    now_s = 400 / 3.8
    monitor.sampled(now_s, EngineSample(running=4, waiting=0, kv_use=0.1))
    state, decision = decide(state, monitor.observe(now_s), (ONE, TWO), now_s, constants)
    assert decision.verb is Verb.CHANGE
    assert state.bias == 1.0
