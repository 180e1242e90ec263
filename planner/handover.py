"""The steps of a handover, as a pure state machine.

A runner performs the effects that ``step`` returns and reports what came of them as events. It stops work that an
effect began before it performs the next one. Times are seconds of the runner's monotonic clock.

The commit point is the event ``Committed``. The runner reports it when the scheduler has recorded the new epoch and no
worker has been told yet; a worker that dies while it is told is then a ``ParticipantLost`` after the commit point.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from typing import assert_never

from planner.errors import InvalidTransition
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
from topology.units import format_bytes

ROUNDS_WITHOUT_PROGRESS = 2  # so many in a row end the sync


class HandoverPhase(Enum):
    PLANNED = "plan"
    PREPARING = "prepare"
    SYNCING = "sync"
    COMMITTING = "commit"
    RETIRING = "retire"
    DONE = "done"
    ROLLING_BACK = "roll back"
    ABORTED = "aborted"


class SyncStop(Enum):
    """Why the rounds of KV copy ended."""

    REMAINDER_SMALL = "the remainder is small enough"
    NO_PROGRESS = "two rounds in a row made no progress"
    ROUND_LIMIT = "the round limit is reached"


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverLimits:
    """How long each phase may take, and when the rounds of KV copy stop."""

    prepare_deadline_s: float = 120.0
    sync_deadline_s: float = 120.0  # all rounds together
    commit_deadline_s: float = 5.0
    retire_deadline_s: float = 30.0
    roll_back_deadline_s: float = 30.0
    remainder_slots: int = 256  # token slots left to copy during the commit pause
    max_rounds: int = 8
    progress_ratio: float = 0.9  # a remainder not below this share of the previous one is no progress

    def __post_init__(self) -> None:
        deadlines = (self.prepare_deadline_s, self.sync_deadline_s, self.commit_deadline_s)
        if min(*deadlines, self.retire_deadline_s, self.roll_back_deadline_s) <= 0:
            raise ValueError("every deadline of a handover must be above 0 s")
        if self.remainder_slots < 0 or self.max_rounds < 1 or not 0 < self.progress_ratio <= 1:
            raise ValueError("remainder_slots >= 0, max_rounds >= 1 and 0 < progress_ratio <= 1 are needed")


Step = tuple["Handover", tuple[Effect, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """A handover as it stands. ``reason`` says why it is rolled back, or what went wrong past the commit point."""

    started_s: float
    phase_started_s: float
    phase: HandoverPhase = HandoverPhase.PLANNED
    rounds: tuple[RoundSent, ...] = ()
    reason: str | None = None
    limits: HandoverLimits = field(default_factory=HandoverLimits)

    @property
    def committed(self) -> bool:
        return self.phase in (HandoverPhase.RETIRING, HandoverPhase.DONE)

    @property
    def finished(self) -> bool:
        return self.phase in (HandoverPhase.DONE, HandoverPhase.ABORTED)

    @property
    def cancellable(self) -> bool:
        """Whether ``Cancelled`` would still keep the old layout (and is not already doing so)."""
        return not (self.committed or self.finished or self.phase is HandoverPhase.ROLLING_BACK)

    @property
    def kv_bytes(self) -> int:
        return sum(sent.sent_bytes for sent in self.rounds)

    @property
    def phase_deadline_s(self) -> float | None:
        """When a ``Tick`` ends the current phase, on the runner's clock; None where nothing is waited for."""
        limits = self.limits
        seconds = {
            HandoverPhase.PREPARING: limits.prepare_deadline_s,
            HandoverPhase.SYNCING: limits.sync_deadline_s,
            HandoverPhase.COMMITTING: limits.commit_deadline_s,
            HandoverPhase.RETIRING: limits.retire_deadline_s,
            HandoverPhase.ROLLING_BACK: limits.roll_back_deadline_s,
        }.get(self.phase)
        return None if seconds is None else self.phase_started_s + seconds


def new_handover(*, now_s: float, limits: HandoverLimits | None = None) -> Handover:
    """Return a handover that waits for ``Started``."""
    return Handover(started_s=now_s, phase_started_s=now_s, limits=limits or HandoverLimits())


def step(old: Handover, event: Event, *, now_s: float) -> Step:
    """Return the next state and the effects to perform, in order.

    ::

        PLANNED --started--> PREPARING --prepared--> SYNCING --stop rule--> COMMITTING --committed--> RETIRING --> DONE
           |                     |                   ^     |                     |                    ^      |
           |                     |                   +round+                     |                    +-lost-+
           |                     +---- failed, lost, cancelled or expired -------+                   (recover)
           |                                          |
        failed, lost, cancelled                  ROLLING_BACK
           |                                          | rolled back or expired
           +------------------------------------> ABORTED

    RETIRING ends in DONE when the old memory is freed, and also when that fails or takes too long (with a reason):
    past the commit point there is no way but forward. ``Cancelled`` and ``Tick`` come from outside, so each phase
    takes them; where they mean nothing, nothing changes.

    Raises:
        InvalidTransition: The event does not belong to the phase.
    """
    match old.phase:
        case HandoverPhase.PLANNED:
            return _step_planned(old, event, now_s)
        case HandoverPhase.PREPARING | HandoverPhase.SYNCING | HandoverPhase.COMMITTING:
            return _step_before_commit(old, event, now_s)
        case HandoverPhase.RETIRING:
            return _step_retiring(old, event, now_s)
        case HandoverPhase.ROLLING_BACK:
            return _step_rolling_back(old, event, now_s)
        case HandoverPhase.DONE | HandoverPhase.ABORTED:
            if isinstance(event, Cancelled | Tick):
                return old, ()
            raise _invalid(old, event)
        case _:
            assert_never(old.phase)


def sync_stop(rounds: tuple[RoundSent, ...], limits: HandoverLimits) -> SyncStop | None:
    """Return why no further round of KV copy is worth it, or None while one is."""
    if not rounds:
        return None
    if rounds[-1].remainder_slots <= limits.remainder_slots:
        return SyncStop.REMAINDER_SMALL
    remainders = [sent.remainder_slots for sent in rounds[-ROUNDS_WITHOUT_PROGRESS - 1 :]]
    progress = [new < limits.progress_ratio * old for old, new in pairwise(remainders)]
    if len(progress) == ROUNDS_WITHOUT_PROGRESS and not any(progress):
        return SyncStop.NO_PROGRESS
    if len(rounds) >= limits.max_rounds:
        return SyncStop.ROUND_LIMIT
    return None


def _step_planned(old: Handover, event: Event, now_s: float) -> Step:
    match event:
        case Started():
            return _enter(old, HandoverPhase.PREPARING, now_s), (Prepare(),)
        case Failed(reason) | ParticipantLost(reason):
            return _enter(old, HandoverPhase.ABORTED, now_s, reason), ()
        case Cancelled():
            return _enter(old, HandoverPhase.ABORTED, now_s, "cancelled"), ()
        case Tick():
            return old, ()
        case _:
            raise _invalid(old, event)


def _step_before_commit(old: Handover, event: Event, now_s: float) -> Step:
    match old.phase, event:
        case _, Failed(reason) | ParticipantLost(reason):
            return _roll_back(old, now_s, reason)
        case _, Cancelled():
            return _roll_back(old, now_s, "cancelled")
        case _, Tick():
            return _roll_back(old, now_s, _late(old)) if _expired(old, now_s) else (old, ())
        case HandoverPhase.PREPARING, Prepared():
            return _enter(old, HandoverPhase.SYNCING, now_s), (CopyRound(1),)
        case HandoverPhase.SYNCING, RoundSent():
            new = replace(old, rounds=(*old.rounds, event))
            if sync_stop(new.rounds, new.limits) is None:
                return new, (CopyRound(len(new.rounds) + 1),)
            return _enter(new, HandoverPhase.COMMITTING, now_s), (Commit(),)
        case HandoverPhase.COMMITTING, Committed():
            return _enter(old, HandoverPhase.RETIRING, now_s), (Retire(),)
        case _:
            raise _invalid(old, event)


def _step_retiring(old: Handover, event: Event, now_s: float) -> Step:
    match event:
        case Retired():
            return _enter(old, HandoverPhase.DONE, now_s), ()
        case Failed(reason):
            return _enter(old, HandoverPhase.DONE, now_s, reason), ()
        case ParticipantLost(reason):
            return replace(old, reason=_joined(old.reason, reason)), (Recover(reason),)
        case Tick() if _expired(old, now_s):
            return _enter(old, HandoverPhase.DONE, now_s, _late(old)), ()
        case Tick() | Cancelled():
            return old, ()
        case _:
            raise _invalid(old, event)


def _step_rolling_back(old: Handover, event: Event, now_s: float) -> Step:
    match event:
        case RolledBack():
            return _enter(old, HandoverPhase.ABORTED, now_s), ()
        case Failed(reason) | ParticipantLost(reason):  # may answer work begun earlier: not the end
            return replace(old, reason=_joined(old.reason, reason)), ()
        case Tick() if _expired(old, now_s):
            return _enter(old, HandoverPhase.ABORTED, now_s, _late(old)), ()
        case Tick() | Cancelled() | Prepared() | RoundSent():  # the last two: late answers of work begun before
            return old, ()
        case _:
            raise _invalid(old, event)


def _enter(old: Handover, phase: HandoverPhase, now_s: float, reason: str | None = None) -> Handover:
    return replace(old, phase=phase, phase_started_s=now_s, reason=_joined(old.reason, reason))


def _roll_back(old: Handover, now_s: float, reason: str) -> Step:
    return _enter(old, HandoverPhase.ROLLING_BACK, now_s, reason), (RollBack(),)


def _expired(old: Handover, now_s: float) -> bool:
    return old.phase_deadline_s is not None and now_s >= old.phase_deadline_s


def _late(old: Handover) -> str:
    seconds = (old.phase_deadline_s or old.phase_started_s) - old.phase_started_s
    return f"{old.phase.value} took longer than {seconds:g} s"


def _joined(first: str | None, second: str | None) -> str | None:
    return "; ".join(part for part in (first, second) if part) or None


def _invalid(old: Handover, event: Event) -> InvalidTransition:
    return InvalidTransition(f"{type(event).__name__} cannot happen in phase {old.phase.name}")


def describe(handover: Handover) -> str:
    """Return how the handover stands, in one sentence for people."""
    rounds = f"{len(handover.rounds)} round{'' if len(handover.rounds) == 1 else 's'}"
    sent = f"{format_bytes(handover.kv_bytes)} KV in {rounds}"
    because = f": {handover.reason}" if handover.reason else ""
    match handover.phase:
        case HandoverPhase.PLANNED:
            return "planned, nothing has moved yet"
        case HandoverPhase.PREPARING:
            return "preparing: the target devices load their layers while the old layout serves"
        case HandoverPhase.SYNCING:
            left = f", {handover.rounds[-1].remainder_slots} token slots left" if handover.rounds else ""
            return f"syncing: {sent}{left}, the old layout serves"
        case HandoverPhase.COMMITTING:
            stop = sync_stop(handover.rounds, handover.limits)
            return f"committing after {sent}" + (f", as {stop.value}" if stop else "")
        case HandoverPhase.RETIRING:
            return f"retiring: the new layout serves, the old one's memory is being freed{because}"
        case HandoverPhase.DONE:
            return f"done: the new layout serves, {sent}" + (f"; not as it should be{because}" if because else "")
        case HandoverPhase.ROLLING_BACK:
            return f"rolling back, the old layout serves{because}"
        case HandoverPhase.ABORTED:
            return f"aborted, the old layout serves{because}"
        case _:
            assert_never(handover.phase)
