"""When steps were dispatched and ended, for benchmarks and for the commit pause. Bounded."""

from collections import deque

_KEPT = 200_000


class StepTrace:
    """Times are seconds of the core's monotonic clock."""

    def __init__(self) -> None:
        self._ends: deque[tuple[float, int]] = deque(maxlen=_KEPT)
        self._dispatches: deque[float] = deque(maxlen=_KEPT)
        self.last_end_s = 0.0
        self.first_dispatch_s: dict[int, float] = {}  # by epoch

    def ended(self, now_s: float, epoch: int) -> None:
        self._ends.append((now_s, epoch))
        self.last_end_s = now_s

    def dispatched(self, now_s: float, epoch: int) -> None:
        self._dispatches.append(now_s)
        if epoch not in self.first_dispatch_s:
            self.first_dispatch_s[epoch] = now_s

    def take(self) -> tuple[list[float], list[int], list[float]]:
        """Return ends, their epochs, and dispatches, and forget them."""
        ends, dispatches = list(self._ends), list(self._dispatches)
        self._ends.clear()
        self._dispatches.clear()
        return [t for t, _ in ends], [e for _, e in ends], dispatches
