"""How much time a search may still take."""

from collections.abc import Callable


class Budget:
    """The time that is left, by a clock that the caller lends."""

    def __init__(self, *, limit_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._end_s = clock() + limit_s
        self.limit_s = limit_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._end_s - self._clock())

    def is_spent(self) -> bool:
        return self.left_s <= 0

    def at_most(self, limit_s: float) -> "Budget":
        """Return what is left, but no more than ``limit_s``, on the same clock."""
        return Budget(limit_s=min(self.left_s, limit_s), clock=self._clock)

    def part(self, share: float) -> "Budget":
        """Return a share of what is left, on the same clock."""
        part = Budget(limit_s=self.left_s * share, clock=self._clock)
        part.limit_s = self.limit_s
        return part
