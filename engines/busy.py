"""How busy workers are, from the time that each has computed since it started. Pure: the clock comes in.

Many ask, each when it likes: the policy, the status, dashboards, Prometheus. So a share is of the last seconds, and
not since somebody else has asked, which may be a moment ago.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

WINDOW_S: Final = 2.0
_CLOSEST_S: Final = 0.05  # readings closer than that are one


class BusyShares:
    """Remembers the readings of the last ``window_s`` of each worker, and one from before."""

    def __init__(self, *, clock: Callable[[], float], window_s: float = WINDOW_S) -> None:
        self._clock = clock
        self._window_s = window_s
        self._readings: dict[int, deque[tuple[float, float]]] = {}

    def share(self, worker: int, busy_s: float) -> float | None:
        """Return the share of time that a worker computed in the window, or since the reading before if that is longer.

        Args:
            busy_s: What it has computed since it started, in seconds. Less than before: it was started again.

        Returns:
            None at the first reading.
        """
        now_s = self._clock()
        readings = self._readings.setdefault(worker, deque())
        if readings and busy_s < readings[-1][1]:
            readings.clear()
        if not readings or now_s - readings[-1][0] >= _CLOSEST_S:
            readings.append((now_s, busy_s))
        while len(readings) > 2 and readings[1][0] <= now_s - self._window_s:
            readings.popleft()
        first_s, first_busy_s = readings[0]
        return None if now_s <= first_s else min(1.0, (busy_s - first_busy_s) / (now_s - first_s))
