"""How long a new replica takes to start, from how long those before it took. Pure.

What counts most is where the parameters come from, so starts are kept apart by that, and by number of stages; of each
kind the last few only: a machine gets faster or busier. What an engine takes to be tried out, where that was done, is
kept apart from what it took to start: whoever starts one knows whether it will be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Final

_KEPT: Final = 8  # starts of a kind


class Origin(Enum):
    """Where an engine finds the parameters. The first start from storage leaves files in the kernel's page cache."""

    STORAGE = "storage"
    PAGE_CACHE = "page cache"  # the files are in memory as long as nobody wants that for anything else
    KEPT = "kept"  # held for the next start, in the form that the engine computes with


_PLACES: Final = {
    Origin.STORAGE: "its parameters come from storage",
    Origin.PAGE_CACHE: "its files are in the page cache",
    Origin.KEPT: "its parameters are kept in host memory",
}

# Where no start of a kind was measured, one of these counts, the likest first.
_LIKE: Final = {
    Origin.KEPT: (Origin.KEPT, Origin.PAGE_CACHE, Origin.STORAGE),
    Origin.PAGE_CACHE: (Origin.PAGE_CACHE, Origin.KEPT, Origin.STORAGE),
    Origin.STORAGE: (Origin.STORAGE, Origin.PAGE_CACHE, Origin.KEPT),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRecord:
    """One start that ended well. ``took_s``: from nothing to an engine that is ready; ``trial_s``: then tried out."""

    num_stages: int
    origin: Origin
    took_s: float
    trial_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedStart:
    """What a new replica would take until it serves, tried out.

    Attributes:
        took_s: With its parameters from ``origin``, where they are now.
        cold_s: From storage; None: such a start was not measured.
    """

    took_s: float
    origin: Origin
    cold_s: float | None

    @property
    def in_words(self) -> str:
        cold = "" if self.cold_s is None or self.origin is Origin.STORAGE else f" ({self.cold_s:.2g} s from storage)"
        return f"ready in {self.took_s:.2g} s, as {_PLACES[self.origin]}{cold}"


def remembered(records: Sequence[StartRecord], new: StartRecord) -> tuple[StartRecord, ...]:
    """Return the records with ``new`` as the last one, and without those that are too many of its kind."""
    alike = [each for each in records if (each.num_stages, each.origin) == (new.num_stages, new.origin)]
    dropped = alike[: max(0, len(alike) + 1 - _KEPT)]
    return (*(each for each in records if not any(each is one for one in dropped)), new)


def expected_start_s(records: Sequence[StartRecord], *, num_stages: int, origin: Origin) -> float | None:
    """Return the median of such starts, else that of the nearest number of stages. None: there was no such start."""
    of_kind = [each for each in records if each.origin is origin]
    if not of_kind:
        return None
    nearest = min((each.num_stages for each in of_kind), key=lambda stages: (abs(stages - num_stages), stages))
    return median(each.took_s for each in of_kind if each.num_stages == nearest)


def expected_trial_s(records: Sequence[StartRecord]) -> float:
    """Return what it takes to try an engine out; 0 where none was."""
    return median([each.trial_s for each in records if each.trial_s is not None] or [0.0])


def expected_start(records: Sequence[StartRecord], *, num_stages: int, origin: Origin) -> ExpectedStart | None:
    """Return what a new replica takes; from the likest starts that were measured. None: there was none."""

    def replica_s(*origins: Origin) -> float | None:
        found = (expected_start_s(records, num_stages=num_stages, origin=like) for like in origins)
        start_s = next((each for each in found if each is not None), None)
        return None if start_s is None else start_s + expected_trial_s(records)

    took_s = replica_s(*_LIKE[origin])
    return None if took_s is None else ExpectedStart(took_s=took_s, origin=origin, cold_s=replica_s(Origin.STORAGE))


def expected_replica_s(records: Sequence[StartRecord], *, num_stages: int, origin: Origin) -> float | None:
    """Return how long a new replica takes until it serves, as ``expected_start`` has it."""
    found = expected_start(records, num_stages=num_stages, origin=origin)
    return None if found is None else found.took_s
