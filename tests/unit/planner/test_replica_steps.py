"""The steps of a replica handover: every way through the state machine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import replica_events as e
from planner.errors import InvalidTransition
from planner.handover import HandoverPhase
from planner.replica_steps import ReplicaHandover, ReplicaLimits, describe, step

NEW = ReplicaHandover(started_s=0.0, limits=ReplicaLimits(start_deadline_s=10.0))
UP_TO_SYNC = [e.Begin(), e.Ready()]


def walk(*events: e.Event, now_s: float = 1.0) -> tuple[ReplicaHandover, tuple[e.Effect, ...]]:
    """Return the state after ``events``, and the effects of the last."""
    state, effects = NEW, ()
    for event in events:
        state, effects = step(state, event, now_s=now_s)
    return state, effects


def test_the_way_forward() -> None:
    ways: list[tuple[e.Event, HandoverPhase, tuple[e.Effect, ...]]] = [
        (e.Begin(), HandoverPhase.PREPARING, (e.StartSecond(),)),
        (e.Said("loading weights"), HandoverPhase.PREPARING, ()),
        (e.Ready(), HandoverPhase.SYNCING, (e.SwitchOver(),)),
        (e.Switched(2), HandoverPhase.SYNCING, (e.TakeOver(),)),
        (e.Taken(), HandoverPhase.SYNCING, (e.TakeOver(),)),
        (e.Taken(), HandoverPhase.COMMITTING, (e.Commit(),)),
        (e.Committed(), HandoverPhase.RETIRING, (e.EndFirst(),)),
        (e.Ended(), HandoverPhase.DONE, ()),
    ]
    state = NEW
    for event, phase, expected in ways:
        state, effects = step(state, event, now_s=1.0)
        assert (state.phase, effects) == (phase, expected)
    assert describe(state) == "the second instance serves, 2 of 2 requests taken over: 2 computed again"


def test_with_no_request_there_is_nothing_to_take_over() -> None:
    state, effects = walk(*UP_TO_SYNC, e.Switched(0))
    assert (state.phase, effects) == (HandoverPhase.COMMITTING, (e.Commit(),))


def test_a_request_that_ends_before_its_turn_does_not_count() -> None:
    state, effects = walk(*UP_TO_SYNC, e.Switched(2), e.Taken(goes_on=False), e.Taken())
    assert (state.taken, state.requests, effects) == (1, 1, (e.Commit(),))


def test_what_the_second_cannot_go_on_with_ends_at_the_first() -> None:
    state, effects = walk(*UP_TO_SYNC, e.Switched(2), e.Stayed(), e.Taken())
    assert (state.requests, state.stayed, effects) == (1, 1, (e.Commit(),))
    state, _ = step(state, e.Committed(), now_s=1.0)
    assert describe(state) == "the second instance serves, 1 more finish at the first"
    state, _ = step(state, e.Ended(), now_s=1.0)
    assert describe(state).endswith("1 of 1 request taken over: 1 computed again, 1 more finished at the first")


def test_what_was_copied_is_summed_up() -> None:
    copied = [e.Taken(copied_bytes=3 << 20), e.Taken(), e.Taken(copied_bytes=2 << 20)]
    state, _ = walk(*UP_TO_SYNC, e.Switched(3), *copied)
    assert (state.taken, state.copied, state.copied_bytes) == (3, 2, 5 << 20)
    assert describe(state) == "3 of 3 requests taken over: 2 KV copied (5 MiB), 1 computed again"
    state, _ = walk(*UP_TO_SYNC, e.Switched(3), *copied, e.Committed(), e.Ended("it did not drain"))
    assert describe(state).endswith("taken over: 2 KV copied (5 MiB), 1 computed again; it did not drain")


@pytest.mark.parametrize(
    ("event", "now_s", "reason"),
    [
        (e.Failed("no memory"), 1.0, "no memory"),
        (e.Cancelled(), 1.0, "cancelled"),
        (e.Tick(), 10.0, "the second instance was not ready after 10 s"),
    ],
    ids=["failed", "cancelled", "late"],
)
def test_before_the_switch_everything_is_rolled_back(event: e.Event, now_s: float, reason: str) -> None:
    state, effects = walk(e.Begin(), event, now_s=now_s)
    assert (state.phase, state.reason, effects) == (HandoverPhase.ROLLING_BACK, reason, (e.DiscardSecond(),))
    for late in (e.Said("still loading"), e.Ready(), e.Failed("cancelled"), e.Cancelled(), e.Tick()):
        assert step(state, late, now_s=2.0) == (state, ())
    aborted, _ = step(state, e.Discarded(), now_s=2.0)
    assert (aborted.phase, aborted.finished) == (HandoverPhase.ABORTED, True)
    assert describe(aborted) == (
        f"the second instance was given up: {reason}; the first instance serves on, no request disturbed"
    )


def test_before_it_begins_there_is_nothing_to_roll_back() -> None:
    state, effects = walk(e.Cancelled())
    assert (state.phase, state.reason, effects) == (HandoverPhase.ABORTED, "cancelled", ())


def test_before_its_deadline_a_tick_changes_nothing() -> None:
    state, _ = walk(e.Begin())
    assert state.deadline_s == 10.0
    assert step(state, e.Tick(), now_s=9.9) == (state, ())


def test_a_switch_that_is_not_possible_is_rolled_back() -> None:
    state, effects = walk(*UP_TO_SYNC, e.Failed("shutting down"))
    assert (state.phase, effects) == (HandoverPhase.ROLLING_BACK, (e.DiscardSecond(),))


def test_after_the_switch_there_is_no_way_back() -> None:
    state, _ = walk(*UP_TO_SYNC, e.Switched(3), e.Taken())
    assert not state.cancellable
    assert step(state, e.Cancelled(), now_s=99.0) == (state, ())
    assert state.deadline_s is None
    failed, effects = step(state, e.Failed("the second died for good"), now_s=1.0)
    assert (failed.phase, effects) == (HandoverPhase.RETIRING, (e.EndFirst(),))
    done, _ = step(failed, e.Ended("it did not drain"), now_s=1.0)
    assert describe(done) == (
        "the second instance serves, 1 of 3 requests taken over: 1 computed again; "
        "the second died for good; it did not drain"
    )


@pytest.mark.parametrize("before", [[e.Begin()], [*UP_TO_SYNC, e.Switched(1)]], ids=["starting", "taking over"])
def test_the_death_of_the_first_is_said_and_changes_no_step(before: list[e.Event]) -> None:
    alive, _ = walk(*before)
    dead, effects = step(alive, e.FirstDied("killed"), now_s=1.0)
    assert (dead.phase, effects) == (alive.phase, ())
    assert describe(dead).endswith("; the first one died (killed)")


def test_an_aborted_handover_whose_first_died_does_not_say_that_it_serves() -> None:
    state, _ = walk(e.Begin(), e.FirstDied("killed"), e.Failed("no memory"), e.Discarded())
    assert describe(state) == (
        "the second instance was given up: no memory; ordinary recovery goes on; the first one died (killed)"
    )


@pytest.mark.parametrize("event", [e.Ready(), e.Switched(1), e.Taken(), e.Committed(), e.Ended(), e.Discarded()])
def test_what_does_not_belong_to_the_phase_is_an_error(event: e.Event) -> None:
    with pytest.raises(InvalidTransition, match="cannot happen in phase PLANNED"):
        step(NEW, event, now_s=0.0)


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="above 0 s"):
        ReplicaLimits(pace_s=0.0)


@given(requests=st.integers(0, 20), ends=st.sets(st.integers(0, 19)), dies_after=st.integers(0, 25))
def test_each_request_is_asked_for_once(requests: int, ends: set[int], dies_after: int) -> None:
    state, effects = walk(*UP_TO_SYNC, e.Switched(requests))
    asked = 0
    while effects == (e.TakeOver(),):
        if asked == dies_after:
            state, _ = step(state, e.FirstDied("killed"), now_s=1.0)
        state, effects = step(state, e.Taken(goes_on=asked not in ends), now_s=1.0)
        asked += 1
    assert (asked, effects) == (requests, (e.Commit(),))
    assert state.taken == state.requests == requests - len(ends & set(range(requests)))
