"""The handover's state machine: every arrow of its drawing, its stop rules, and what holds whatever happens."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import InvalidTransition
from planner.handover import (
    Handover,
    HandoverLimits,
    HandoverPhase,
    SyncStop,
    describe,
    new_handover,
    step,
    sync_stop,
)
from planner.handover_events import (
    Cancelled,
    Commit,
    Committed,
    CopyRound,
    Effect,
    Event,
    Failed,
    ParticipantLost,
    Prepare,
    Prepared,
    Recover,
    Retire,
    Retired,
    RollBack,
    RolledBack,
    RoundSent,
    Started,
    Tick,
)

P = HandoverPhase
LIMITS = HandoverLimits(remainder_slots=10, max_rounds=5)


def sent(remainder: int, *, slots: int = 100, size: int = 1024) -> RoundSent:
    return RoundSent(sent_slots=slots, sent_bytes=size, remainder_slots=remainder)


def play(*events: Event, limits: HandoverLimits = LIMITS) -> tuple[Handover, list[Effect]]:
    """Feed events one second apart and return the end with all effects."""
    handover = new_handover(now_s=0.0, limits=limits)
    effects: list[Effect] = []
    for now_s, event in enumerate(events, start=1):
        handover, new = step(handover, event, now_s=float(now_s))
        effects += new
    return handover, effects


TO_PHASE: dict[HandoverPhase, tuple[Event, ...]] = {
    P.PLANNED: (),
    P.PREPARING: (Started(),),
    P.SYNCING: (Started(), Prepared()),
    P.COMMITTING: (Started(), Prepared(), sent(3)),
    P.RETIRING: (Started(), Prepared(), sent(3), Committed()),
    P.DONE: (Started(), Prepared(), sent(3), Committed(), Retired()),
    P.ROLLING_BACK: (Started(), Failed("disk error")),
    P.ABORTED: (Started(), Failed("disk error"), RolledBack()),
}
BEFORE_COMMIT = (P.PREPARING, P.SYNCING, P.COMMITTING)


def at(phase: HandoverPhase) -> Handover:
    handover, _ = play(*TO_PHASE[phase])
    assert handover.phase is phase
    return handover


def test_a_handover_without_trouble_prepares_copies_commits_and_retires() -> None:
    handover, effects = play(Started(), Prepared(), sent(80), sent(40), sent(4), Committed(), Retired())
    assert effects == [Prepare(), CopyRound(1), CopyRound(2), CopyRound(3), Commit(), Retire()]
    assert handover.phase is P.DONE
    assert handover.finished
    assert handover.committed
    assert handover.reason is None
    assert (handover.started_s, handover.phase_started_s) == (0.0, 7.0)
    assert describe(handover) == "done: the new layout serves, 3 KiB KV in 3 rounds"


@pytest.mark.parametrize("phase", BEFORE_COMMIT)
@pytest.mark.parametrize(
    ("event", "reason"),
    [(Failed("disk error"), "disk error"), (ParticipantLost("cpu:3 died"), "cpu:3 died"), (Cancelled(), "cancelled")],
)
def test_trouble_before_the_commit_point_rolls_back(phase: HandoverPhase, event: Event, reason: str) -> None:
    handover, effects = step(at(phase), event, now_s=9.0)
    assert (handover.phase, effects, handover.reason) == (P.ROLLING_BACK, (RollBack(),), reason)
    handover, effects = step(handover, RolledBack(), now_s=10.0)
    assert (handover.phase, effects) == (P.ABORTED, ())
    assert describe(handover) == f"aborted, the old layout serves: {reason}"


@pytest.mark.parametrize("event", [Failed("no memory"), ParticipantLost("cpu:3 died"), Cancelled()])
def test_before_it_has_begun_there_is_nothing_to_roll_back(event: Event) -> None:
    handover, effects = step(at(P.PLANNED), event, now_s=1.0)
    assert (handover.phase, effects) == (P.ABORTED, ())


@pytest.mark.parametrize(
    ("phase", "seconds", "after"),
    [
        (P.PREPARING, 120.0, P.ROLLING_BACK),
        (P.SYNCING, 120.0, P.ROLLING_BACK),
        (P.COMMITTING, 5.0, P.ROLLING_BACK),
        (P.RETIRING, 30.0, P.DONE),
        (P.ROLLING_BACK, 30.0, P.ABORTED),
    ],
)
def test_each_phase_has_a_deadline(phase: HandoverPhase, seconds: float, after: HandoverPhase) -> None:
    handover = at(phase)
    assert handover.phase_deadline_s == handover.phase_started_s + seconds
    assert step(handover, Tick(), now_s=handover.phase_started_s + seconds - 0.01) == (handover, ())
    late, effects = step(handover, Tick(), now_s=handover.phase_started_s + seconds)
    assert late.phase is after
    assert effects == ((RollBack(),) if after is P.ROLLING_BACK else ())
    assert f"{phase.value} took longer than {seconds:g} s" in str(late.reason)


@pytest.mark.parametrize("phase", [P.PLANNED, P.DONE, P.ABORTED])
def test_where_nothing_is_waited_for_time_changes_nothing(phase: HandoverPhase) -> None:
    assert at(phase).phase_deadline_s is None
    assert step(at(phase), Tick(), now_s=1e9) == (at(phase), ())


def test_the_rounds_share_one_deadline() -> None:
    handover, _ = play(Started(), Prepared(), sent(80), sent(40))
    assert handover.phase_deadline_s == 2.0 + LIMITS.sync_deadline_s


@pytest.mark.parametrize(
    ("remainders", "stop"),
    [
        ((), None),
        ((80,), None),
        ((80, 70, 60), None),  # each below 0.9 of the one before
        ((80, 10), SyncStop.REMAINDER_SMALL),
        ((0,), SyncStop.REMAINDER_SMALL),
        ((100, 90), None),  # one round without progress
        ((100, 90, 81), SyncStop.NO_PROGRESS),
        ((100, 120, 140), SyncStop.NO_PROGRESS),
        ((100, 90, 70, 69), None),  # not two in a row
        ((100, 90, 70, 69, 68), SyncStop.NO_PROGRESS),
        ((900, 700, 500, 400, 300), SyncStop.ROUND_LIMIT),
    ],
)
def test_stop_rules_of_the_rounds(remainders: tuple[int, ...], stop: SyncStop | None) -> None:
    rounds = tuple(sent(remainder) for remainder in remainders)
    assert sync_stop(rounds, LIMITS) is stop
    if rounds:
        handover, effects = play(Started(), Prepared(), *rounds)
        assert effects[-1] == (Commit() if stop else CopyRound(len(rounds) + 1))
        assert handover.rounds == rounds


def test_past_the_commit_point_cancel_is_not_honoured() -> None:
    cancellable = {phase for phase in P if at(phase).cancellable}
    assert cancellable == {P.PLANNED, *BEFORE_COMMIT}
    for phase in (P.RETIRING, P.DONE, P.ABORTED, P.ROLLING_BACK):
        assert step(at(phase), Cancelled(), now_s=9.0) == (at(phase), ())


def test_past_the_commit_point_a_lost_worker_is_recovered_and_the_handover_goes_on() -> None:
    handover, effects = step(at(P.RETIRING), ParticipantLost("cpu:1 died"), now_s=5.0)
    assert (handover.phase, effects) == (P.RETIRING, (Recover("cpu:1 died"),))
    handover, effects = step(handover, Retired(), now_s=6.0)
    assert (handover.phase, effects) == (P.DONE, ())
    assert describe(handover) == "done: the new layout serves, 1 KiB KV in 1 round; not as it should be: cpu:1 died"


def test_a_failed_retire_ends_in_done_with_its_reason() -> None:
    handover, effects = step(at(P.RETIRING), Failed("munmap failed"), now_s=5.0)
    assert (handover.phase, effects, handover.reason) == (P.DONE, (), "munmap failed")


@pytest.mark.parametrize("event", [Prepared(), sent(50), Failed("copy broke"), ParticipantLost("cpu:2 died")])
def test_late_answers_do_not_disturb_a_roll_back(event: Event) -> None:
    handover, effects = step(at(P.ROLLING_BACK), event, now_s=5.0)
    assert (handover.phase, effects) == (P.ROLLING_BACK, ())
    assert str(handover.reason).startswith("disk error")


ALLOWED: dict[HandoverPhase, tuple[type[Event], ...]] = {
    P.PLANNED: (Started, Failed, ParticipantLost),
    P.PREPARING: (Prepared, Failed, ParticipantLost),
    P.SYNCING: (RoundSent, Failed, ParticipantLost),
    P.COMMITTING: (Committed, Failed, ParticipantLost),
    P.RETIRING: (Retired, Failed, ParticipantLost),
    P.DONE: (),
    P.ROLLING_BACK: (RolledBack, Prepared, RoundSent, Failed, ParticipantLost),
    P.ABORTED: (),
}
ONE_OF_EACH: tuple[Event, ...] = (
    Started(), Prepared(), sent(5), Committed(), Retired(), RolledBack(), Failed("x"), ParticipantLost("y"),
)  # fmt: skip


@pytest.mark.parametrize("phase", list(P))
@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: type(event).__name__)
def test_an_event_of_another_phase_is_refused_by_name(phase: HandoverPhase, event: Event) -> None:
    if isinstance(event, ALLOWED[phase]):
        step(at(phase), event, now_s=5.0)
    else:
        with pytest.raises(InvalidTransition, match=f"{type(event).__name__} cannot happen in phase {phase.name}"):
            step(at(phase), event, now_s=5.0)


@pytest.mark.parametrize("phase", list(P))
def test_every_phase_is_described_in_one_line(phase: HandoverPhase) -> None:
    assert describe(at(phase))
    assert "\n" not in describe(at(phase))


def test_describe_says_why_it_commits() -> None:
    assert describe(at(P.COMMITTING)) == "committing after 1 KiB KV in 1 round, as the remainder is small enough"
    assert describe(play(Started(), Prepared(), sent(40))[0]) == (
        "syncing: 1 KiB KV in 1 round, 40 token slots left, the old layout serves"
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: HandoverLimits(commit_deadline_s=0.0),
        lambda: HandoverLimits(max_rounds=0),
        lambda: HandoverLimits(progress_ratio=0.0),
        lambda: HandoverLimits(remainder_slots=-1),
    ],
)
def test_impossible_limits_are_refused(make: Callable[[], HandoverLimits]) -> None:
    with pytest.raises(ValueError, match=r"above 0 s|are needed"):
        make()


def test_a_round_cannot_send_less_than_nothing() -> None:
    with pytest.raises(ValueError, match="less than nothing"):
        sent(-1)


# ---- whatever happens

EVENTS = st.one_of(
    st.sampled_from([Started(), Prepared(), Committed(), Retired(), RolledBack(), Cancelled(), Tick()]),
    st.sampled_from([Failed("failed"), ParticipantLost("lost")]),
    st.builds(RoundSent, sent_slots=st.just(1), sent_bytes=st.just(1), remainder_slots=st.integers(0, 200)),
)


def answer(effect: Effect, remainder: int) -> Event | None:
    """Return what a runner reports when an effect succeeds."""
    match effect:
        case Prepare():
            return Prepared()
        case CopyRound():
            return sent(remainder)
        case Commit():
            return Committed()
        case Retire():
            return Retired()
        case RollBack():
            return RolledBack()
        case Recover():
            return None


@given(steps=st.lists(st.tuples(EVENTS, st.floats(0, 60)), max_size=60))
@settings(deadline=None)
def test_whatever_comes_it_commits_or_rolls_back_and_never_both(steps: list[tuple[Event, float]]) -> None:
    handover, now_s = new_handover(now_s=0.0, limits=LIMITS), 0.0
    effects: list[Effect] = []
    phases = [handover.phase]
    for event, seconds in steps:
        now_s += seconds
        old = handover
        try:
            handover, new = step(old, event, now_s=now_s)
        except InvalidTransition:
            assert not isinstance(event, Cancelled | Tick)
            continue
        effects += new
        phases.append(handover.phase)
        assert not (old.finished and (handover is not old or new))  # the end is the end
        assert not (old.committed and not handover.committed)  # after the commit point only forward
        assert not (old.committed and RollBack() in new)
        assert describe(handover)
    assert effects.count(RollBack()) + effects.count(Retire()) <= 1  # Retire is asked for by Committed alone
    assert len(handover.rounds) <= LIMITS.max_rounds
    assert (Retire() in effects) == handover.committed
    assert all(Recover("lost") != effect or handover.committed for effect in effects)
    if P.ABORTED in phases and P.PREPARING in phases:
        assert effects.count(RollBack()) == 1


@given(
    steps=st.lists(st.tuples(st.none() | EVENTS, st.integers(0, 200)), max_size=30),
    remainders=st.lists(st.integers(0, 1000), min_size=LIMITS.max_rounds, max_size=LIMITS.max_rounds),
)
@settings(deadline=None)
def test_a_runner_that_answers_always_comes_to_an_end(
    steps: list[tuple[Event | None, int]], remainders: list[int]
) -> None:
    """Disturb a runner as long as the steps last, then let it answer what it is asked: it ends within a bound."""
    handover, pending = step(new_handover(now_s=0.0, limits=LIMITS), Started(), now_s=0.0)
    now_s = 0.0
    for event, seconds in steps:
        now_s += seconds
        if isinstance(event, Failed | ParticipantLost | Cancelled | Tick) and not handover.finished:
            handover, new = step(handover, event, now_s=now_s)
            pending = new or pending  # new work replaces the work it stops
    left = iter(remainders)
    for _ in range(LIMITS.max_rounds + 4):
        asked = [reply for effect in pending if (reply := answer(effect, next(left, 0))) is not None]
        if handover.finished:
            break
        handover, pending = step(handover, asked[0] if asked else Retired(), now_s=now_s)
    assert handover.finished


@given(steps=st.lists(EVENTS, max_size=20))
@settings(deadline=None)
def test_time_alone_ends_every_handover_that_has_begun(steps: list[Event]) -> None:
    handover, _ = play(Started())
    for event in steps:
        try:
            handover, _ = step(handover, event, now_s=2.0)
        except InvalidTransition:
            continue
    for _ in range(2):  # at most: roll back, then abort
        handover, _ = step(handover, Tick(), now_s=(handover.phase_deadline_s or 0.0) + 1)
    assert handover.finished
