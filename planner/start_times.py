"""How long a new replica takes to start, from how long those before it took. Pure.

A start is warm where the parameters are in the memory of the host already, as after another start, and cold where they
come from storage. Each is remembered by number of stages, the last few only: a machine gets faster or busier.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

_KEPT: Final = 8  # starts of a kind


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRecord:
    """One start that ended well: from nothing to an engine that serves."""

    num_stages: int
    is_warm: bool
    took_s: float


def remembered(records: Sequence[StartRecord], new: StartRecord) -> tuple[StartRecord, ...]:
    """Return the records with ``new`` as the last one, and without those that are too many of its kind."""
    alike = [each for each in records if (each.num_stages, each.is_warm) == (new.num_stages, new.is_warm)]
    dropped = alike[: max(0, len(alike) + 1 - _KEPT)]
    return (*(each for each in records if not any(each is one for one in dropped)), new)


def expected_start_s(records: Sequence[StartRecord], *, num_stages: int, is_warm: bool) -> float | None:
    """Return the median of such starts, else that of the nearest number of stages. None: there was no such start."""
    of_kind = [each for each in records if each.is_warm is is_warm]
    if not of_kind:
        return None
    nearest = min((each.num_stages for each in of_kind), key=lambda stages: (abs(stages - num_stages), stages))
    return median(each.took_s for each in of_kind if each.num_stages == nearest)
