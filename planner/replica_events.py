"""What a replica handover is told (events) and what it asks for (effects); ``planner.replica_steps`` has the steps.

Each effect names the events that may answer it.
"""

from dataclasses import dataclass

# ---- events: what happened


@dataclass(frozen=True, slots=True)
class Begin:
    """The second instance may be started."""


@dataclass(frozen=True, slots=True)
class Said:
    """What the starting instance says."""

    text: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The second instance could serve."""


@dataclass(frozen=True, slots=True)
class Switched:
    """The second instance is in force; ``requests`` are still at the first."""

    requests: int


@dataclass(frozen=True, slots=True)
class Taken:
    """One request has left the first instance. ``goes_on`` False: by ending before it was its turn.

    ``copied_bytes``: of its KV cache; None: that is computed again.
    """

    goes_on: bool = True
    copied_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Stayed:
    """One request ends at the first instance: the second could not go on with it."""


@dataclass(frozen=True, slots=True)
class Committed:
    """No request is left at the first instance."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The first instance has ended. ``reason`` says what was not as it should be, if anything."""

    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Discarded:
    """Nothing is left of the second instance."""


@dataclass(frozen=True, slots=True)
class FirstDied:
    """The first instance ended unasked. Its requests wait for the second, or move there by themselves."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The work of the current phase failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Somebody asked to stop. Past the commit point this changes nothing."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: the deadline is checked on this event and on no other."""


Event = (
    Begin
    | Said
    | Ready
    | Switched
    | Taken
    | Stayed
    | Committed
    | Ended
    | Discarded
    | FirstDied
    | Failed
    | Cancelled
    | Tick
)


# ---- effects: what to do next


@dataclass(frozen=True, slots=True)
class StartSecond:
    """Start the second instance; tell Said as it goes, then Ready or Failed."""


@dataclass(frozen=True, slots=True)
class SwitchOver:
    """Put the second instance in force at once; tell Switched or Failed."""


@dataclass(frozen=True, slots=True)
class TakeOver:
    """Take the next request off the first instance, to go on at the second; tell Taken or Failed."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Make sure that the first instance has nothing left to do but what stays there; tell Committed."""


@dataclass(frozen=True, slots=True)
class EndFirst:
    """Drain and close the first instance; tell Ended."""


@dataclass(frozen=True, slots=True)
class DiscardSecond:
    """Close the second instance, however far it got; tell Discarded."""


Effect = StartSecond | SwitchOver | TakeOver | Commit | EndFirst | DiscardSecond
