"""What a handover is told (events) and what it asks for (effects); ``planner.handover`` has the steps between them.

Each effect names the events that may answer it.
"""

from dataclasses import dataclass

# ---- events: what happened


@dataclass(frozen=True, slots=True)
class Started:
    """The handover may begin."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Every target device holds its weights and has reserved its KV memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSent:
    """A round of KV copy is complete; ``remainder_slots`` token slots have been written since it began."""

    sent_slots: int
    sent_bytes: int
    remainder_slots: int

    def __post_init__(self) -> None:
        if min(self.sent_slots, self.sent_bytes, self.remainder_slots) < 0:
            raise ValueError(f"a round cannot send or leave less than nothing: {self}")


@dataclass(frozen=True, slots=True)
class Committed:
    """The new epoch is recorded: from here on the target layout is the truth."""


@dataclass(frozen=True, slots=True)
class Retired:
    """What the old layout held is freed."""


@dataclass(frozen=True, slots=True)
class RolledBack:
    """What was prepared is freed; the old layout goes on as if nothing had been."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The work of the current phase failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class ParticipantLost:
    """A worker of the old or the target layout has died."""

    reason: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Somebody asked to stop. Past the commit point this changes nothing."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: deadlines are checked on this event and on no other."""


Event = Started | Prepared | RoundSent | Committed | Retired | RolledBack | Failed | ParticipantLost | Cancelled | Tick


# ---- effects: what to do next


@dataclass(frozen=True, slots=True)
class Prepare:
    """Load weights and reserve KV memory on the target devices; answer Prepared or Failed."""


@dataclass(frozen=True, slots=True)
class CopyRound:
    """Copy the KV slots written since the last round began (round 1: all live ones); answer RoundSent or Failed."""

    number: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Hold scheduling, drain, copy the remainder, record the new epoch; answer Committed or Failed, then adopt it."""


@dataclass(frozen=True, slots=True)
class Retire:
    """Free what the old layout held; answer Retired or Failed."""


@dataclass(frozen=True, slots=True)
class RollBack:
    """Stop, free what was prepared and go on with the old layout; answer RolledBack."""


@dataclass(frozen=True, slots=True)
class Recover:
    """A worker was lost past the commit point: recover it in the new layout, as any crash. Nothing to answer."""

    reason: str


Effect = Prepare | CopyRound | Commit | Retire | RollBack | Recover
