"""Tokens per second from a counter that only grows, over the last few seconds. Pure: readings come with their time."""

from collections import deque


class TokenRate:
    """Readings of a total over a window of ``window_s``. A total that falls (the engine restarted) starts afresh."""

    def __init__(self, *, window_s: float = 5.0) -> None:
        self._window_s = window_s
        self._readings: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, total: int) -> None:
        """Add one reading, not older than the last."""
        if self._readings and total < self._readings[-1][1]:
            self._readings.clear()
        self._readings.append((now_s, total))
        while len(self._readings) > 2 and self._readings[1][0] <= now_s - self._window_s:
            self._readings.popleft()

    def clear(self) -> None:
        """Forget all readings: the counter is gone."""
        self._readings.clear()

    @property
    def tokens_per_s(self) -> float | None:
        """Mean over the window, None before two readings at different times."""
        if len(self._readings) < 2:
            return None
        (first_s, first), (last_s, last) = self._readings[0], self._readings[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else None
