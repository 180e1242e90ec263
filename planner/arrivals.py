"""Arrivals over several windows at once: rate, CV of the gaps, and which way the rate goes. Pure: times come in."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import sqrt
from typing import Final

FEWEST_GAPS: Final = 8  # below it, a CV says more about chance than about the arrivals


class Absence(Enum):
    """Why there is no value. It is a state of its own: never a zero, never a NaN."""

    NOT_YET = "not measured yet"
    TOO_FEW = "too few requests to say"
    STALE = "not measured for a while"
    UNSUPPORTED = "the engine does not say"


Reading = float | Absence


def reading_to_wire(reading: Reading) -> float | str:
    """Return a reading as a JSON value: a number, or in words why there is none."""
    return reading.value if isinstance(reading, Absence) else reading


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalStatistics:
    """One window. ``rate_per_s`` is 0 where nobody came: that is known, and not missing."""

    window_s: float
    arrivals: int
    rate_per_s: Reading
    cv: Reading
    gradient_per_s2: Reading  # rate of the newer half less that of the older one, over half the window


class ArrivalWindow:
    """Arrivals of the last ``window_s``, with running sums, so that a window of any length costs the same to read."""

    def __init__(self, window_s: float, *, began_s: float) -> None:
        if window_s <= 0:
            raise ValueError(f"a window of {window_s:g} s")
        self.window_s = window_s
        self._began_s = began_s
        self._arrivals: deque[tuple[float, float | None]] = deque()  # time, gap to the one before in the window
        self._newer: deque[float] = deque()  # times in the newer half
        self._gaps, self._sum_s, self._sum_s2 = 0, 0.0, 0.0

    def add(self, at_s: float) -> None:
        """Add one arrival, not earlier than the last."""
        self._forget(at_s)
        gap = at_s - self._arrivals[-1][0] if self._arrivals else None
        self._arrivals.append((at_s, gap))
        self._newer.append(at_s)
        self._count(gap, +1)

    def statistics(self, now_s: float) -> ArrivalStatistics:
        """Return what the window says at ``now_s``."""
        self._forget(now_s)
        seen_s = min(self.window_s, now_s - self._began_s)
        count = len(self._arrivals)
        return ArrivalStatistics(
            window_s=self.window_s,
            arrivals=count,
            rate_per_s=count / seen_s if seen_s > 0 else Absence.NOT_YET,
            cv=self._cv(),
            gradient_per_s2=self._gradient(count) if seen_s >= self.window_s else Absence.NOT_YET,
        )

    def _cv(self) -> Reading:
        if self._gaps < FEWEST_GAPS or self._sum_s <= 0:
            return Absence.TOO_FEW
        mean_s = self._sum_s / self._gaps
        return sqrt(max(0.0, self._sum_s2 / self._gaps - mean_s**2)) / mean_s

    def _gradient(self, count: int) -> float:
        half_s, newer = self.window_s / 2, len(self._newer)
        return (newer - (count - newer)) / half_s / half_s

    def _forget(self, now_s: float) -> None:
        """Leave out what is older than the window, and the gap that only ends in it: after a night in which nobody came
        it would count as bursts for as long as its end is in the window."""
        while self._arrivals and self._arrivals[0][0] <= now_s - self.window_s:
            self._arrivals.popleft()
            if self._arrivals:
                at_s, gap = self._arrivals[0]
                self._count(gap, -1)
                self._arrivals[0] = (at_s, None)
        while self._newer and self._newer[0] <= now_s - self.window_s / 2:
            self._newer.popleft()
        if not self._arrivals:  # no rounding survives an empty window
            self._gaps, self._sum_s, self._sum_s2 = 0, 0.0, 0.0

    def _count(self, gap: float | None, sign: int) -> None:
        if gap is not None:
            self._gaps += sign
            self._sum_s += sign * gap
            self._sum_s2 += sign * gap * gap


class Arrivals:
    """The same arrivals in every window."""

    def __init__(self, windows_s: Sequence[float], *, began_s: float) -> None:
        self._windows = tuple(ArrivalWindow(window_s, began_s=began_s) for window_s in sorted(windows_s))

    def add(self, at_s: float) -> None:
        """Add one arrival, not earlier than the last."""
        for window in self._windows:
            window.add(at_s)

    def statistics(self, now_s: float) -> tuple[ArrivalStatistics, ...]:
        """Return what each window says, the shortest first."""
        return tuple(window.statistics(now_s) for window in self._windows)
