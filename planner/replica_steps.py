"""The steps of a replica handover, as a pure state machine: a second instance starts beside the first and takes over.

It is the way to another layout where an engine cannot change its own: more ranks than are resident, a feature that
cannot be moved, or an operator who asks for it. Phases are those of ``planner.handover``, so it is reported alike.

The commit point is the switch-over, when the second instance is ready: from then on it is the one in force and gets
every new request. Before it the first one serves as if nothing had been; after it there is no way but forward.
"""

from dataclasses import dataclass, field, replace
from typing import assert_never

from planner.errors import InvalidTransition
from planner.handover import HandoverPhase
from planner.replica_events import (
    Begin,
    Cancelled,
    Commit,
    Committed,
    Discarded,
    DiscardSecond,
    Effect,
    Ended,
    EndFirst,
    Event,
    Failed,
    FirstDied,
    Ready,
    Said,
    StartSecond,
    Stayed,
    Switched,
    SwitchOver,
    Taken,
    TakeOver,
    Tick,
)
from topology.units import format_bytes, plural


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLimits:
    """How long things may take."""

    start_deadline_s: float = 1800.0  # engines have their own, shorter ones; this one is for an engine without
    pace_s: float = 10.0  # so long the next request waits for the one before to get its first token
    drain_deadline_s: float = 30.0

    def __post_init__(self) -> None:
        if min(self.start_deadline_s, self.pace_s, self.drain_deadline_s) <= 0:
            raise ValueError("every deadline of a replica handover must be above 0 s")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaHandover:
    """A replica handover as it stands. ``reason`` says why it is rolled back, or what went wrong after the switch."""

    started_s: float
    phase: HandoverPhase = HandoverPhase.PLANNED
    said: str = ""  # the last word of the starting instance
    switched: bool = False
    requests: int = 0  # to be taken over, those that have been included
    taken: int = 0
    copied: int = 0  # of those taken, with their KV cache
    copied_bytes: int = 0
    stayed: int = 0
    first_death: str | None = None
    reason: str | None = None
    limits: ReplicaLimits = field(default_factory=ReplicaLimits)

    @property
    def cancellable(self) -> bool:
        return self.phase in (HandoverPhase.PLANNED, HandoverPhase.PREPARING)

    @property
    def finished(self) -> bool:
        return self.phase in (HandoverPhase.DONE, HandoverPhase.ABORTED)

    @property
    def deadline_s(self) -> float | None:
        """When a ``Tick`` ends the phase, None where nothing but its own end does."""
        return self.started_s + self.limits.start_deadline_s if self.phase is HandoverPhase.PREPARING else None


Step = tuple[ReplicaHandover, tuple[Effect, ...]]


def step(old: ReplicaHandover, event: Event, *, now_s: float) -> Step:
    """Return the next state and the effects to perform, in order.

    ::

        PLANNED --begin--> PREPARING --ready--> SYNCING --switched, each taken--> COMMITTING --> RETIRING --> DONE
                               |                   | not switched                                  ^
                failed, cancelled, late            | else failed: the rest ends at the first ------+
                               v                   |
                         ROLLING_BACK <------------+
                               | discarded
                               v
                            ABORTED <--cancelled-- PLANNED

    ``FirstDied`` changes what is said and nothing else: without the switch, the supervisor recovers as from any crash.

    Raises:
        InvalidTransition: The event does not belong to the phase.
    """
    if isinstance(event, FirstDied):
        return replace(old, first_death=event.reason), ()
    match old.phase:
        case HandoverPhase.PLANNED if isinstance(event, Begin):
            return replace(old, phase=HandoverPhase.PREPARING), (StartSecond(),)
        case HandoverPhase.PLANNED if isinstance(event, Cancelled):
            return replace(old, phase=HandoverPhase.ABORTED, reason="cancelled"), ()
        case HandoverPhase.PREPARING:
            return _step_preparing(old, event, now_s)
        case HandoverPhase.SYNCING:
            return _step_syncing(old, event)
        case HandoverPhase.COMMITTING if isinstance(event, Committed):
            return replace(old, phase=HandoverPhase.RETIRING), (EndFirst(),)
        case HandoverPhase.RETIRING if isinstance(event, Ended):
            return replace(old, phase=HandoverPhase.DONE, reason=_joined(old.reason, event.reason)), ()
        case HandoverPhase.ROLLING_BACK if isinstance(event, Discarded):
            return replace(old, phase=HandoverPhase.ABORTED), ()
        case HandoverPhase.ROLLING_BACK if isinstance(event, Said | Ready | Failed):
            return old, ()  # late answers of the start
        case _ if isinstance(event, Cancelled | Tick):
            return old, ()
        case _:
            raise _invalid(old, event)


def _step_preparing(old: ReplicaHandover, event: Event, now_s: float) -> Step:
    match event:
        case Said(text=text):
            return replace(old, said=text), ()
        case Ready():
            return replace(old, phase=HandoverPhase.SYNCING), (SwitchOver(),)
        case Failed(reason=reason):
            return _roll_back(old, reason)
        case Cancelled():
            return _roll_back(old, "cancelled")
        case Tick() if old.deadline_s is not None and now_s >= old.deadline_s:
            return _roll_back(old, f"the second instance was not ready after {old.limits.start_deadline_s:g} s")
        case Tick():
            return old, ()
        case _:
            raise _invalid(old, event)


def _step_syncing(old: ReplicaHandover, event: Event) -> Step:
    match event:
        case Switched(requests=requests) if not old.switched:
            return _next_request(replace(old, switched=True, requests=requests))
        case Taken(goes_on=True, copied_bytes=None) if old.switched:
            return _next_request(replace(old, taken=old.taken + 1))
        case Taken(goes_on=True, copied_bytes=int(size)) if old.switched:
            copied_bytes = old.copied_bytes + size
            return _next_request(replace(old, taken=old.taken + 1, copied=old.copied + 1, copied_bytes=copied_bytes))
        case Taken() if old.switched:
            return _next_request(replace(old, requests=old.requests - 1))
        case Stayed() if old.switched:
            return _next_request(replace(old, requests=old.requests - 1, stayed=old.stayed + 1))
        case Failed(reason=reason) if old.switched:
            return replace(old, phase=HandoverPhase.RETIRING, reason=reason), (EndFirst(),)
        case Failed(reason=reason):
            return _roll_back(old, reason)
        case Cancelled() | Tick():
            return old, ()
        case _:
            raise _invalid(old, event)


def _next_request(old: ReplicaHandover) -> Step:
    if old.taken < old.requests:
        return old, (TakeOver(),)
    return replace(old, phase=HandoverPhase.COMMITTING), (Commit(),)


def _roll_back(old: ReplicaHandover, reason: str) -> Step:
    return replace(old, phase=HandoverPhase.ROLLING_BACK, reason=reason), (DiscardSecond(),)


def _joined(first: str | None, second: str | None) -> str | None:
    return "; ".join(part for part in (first, second) if part) or None


def _invalid(old: ReplicaHandover, event: Event) -> InvalidTransition:
    return InvalidTransition(f"{type(event).__name__} cannot happen in phase {old.phase.name}")


def describe(handover: ReplicaHandover) -> str:
    """Return how it stands, in one sentence for people."""
    because = f": {handover.reason}" if handover.reason else ""
    dead = "" if handover.first_death is None else f"; the first one died ({handover.first_death})"
    match handover.phase:
        case HandoverPhase.PLANNED:
            return "planned, nothing has been started yet"
        case HandoverPhase.PREPARING:
            return f"second instance: {handover.said or 'starting'}{dead}"
        case HandoverPhase.SYNCING if not handover.switched:
            return f"switching over{dead}"
        case HandoverPhase.SYNCING:
            return f"{_requests_taken(handover)}{dead}"
        case HandoverPhase.COMMITTING:
            return f"{_requests_taken(handover)}{_how(replace(handover, stayed=0))}{dead}"
        case HandoverPhase.RETIRING:
            last = f"{handover.stayed} more finish at the first" if handover.stayed else "the first one ends"
            return f"the second instance serves, {last}{because}{dead}"
        case HandoverPhase.DONE:
            because = because.replace(":", ";", 1) if handover.taken else because
            return f"the second instance serves, {_requests_taken(handover)}{_how(handover)}{because}{dead}"
        case HandoverPhase.ROLLING_BACK:
            return f"ending the second instance{because}{dead}"
        case HandoverPhase.ABORTED:
            stays = "the first instance serves on, no request disturbed" if not dead else "ordinary recovery goes on"
            return f"the second instance was given up{because}; {stays}{dead}"
        case _:
            assert_never(handover.phase)


def _requests_taken(handover: ReplicaHandover) -> str:
    if not handover.requests:
        return "no request to take over"
    return f"{handover.taken} of {plural(handover.requests, 'request')} taken over"


def _how(handover: ReplicaHandover) -> str:
    """Say how the KV caches got there."""
    again = handover.taken - handover.copied
    copied = f"{handover.copied} KV copied ({format_bytes(handover.copied_bytes)})" if handover.copied else ""
    parts = [part for part in (copied, f"{again} computed again" if again else "") if part]
    stayed = f", {handover.stayed} more finished at the first" if handover.stayed else ""
    return (f": {', '.join(parts)}" if parts else "") + stayed
