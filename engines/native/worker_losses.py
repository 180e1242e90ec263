"""Workers that have ended: what they said last, and whether too many have ended lately to go on (pure)."""

from typing import Final

_WINDOW_S: Final = 60.0
_MOST_PER_WORKER: Final = 10


class WorkerLosses:
    """Of ``num_workers`` workers."""

    def __init__(self, num_workers: int) -> None:
        self._most = _MOST_PER_WORKER * num_workers
        self._at_s: list[float] = []
        self._last_words: dict[int, str] = {}

    def said(self, worker: int, reason: str) -> None:
        """A worker has told why it is about to end."""
        self._last_words[worker] = reason

    def ended(self, worker: int, how: str, *, now_s: float) -> str:
        """Count a worker that has ended, and return why, with its last words."""
        self._at_s = [at_s for at_s in self._at_s if now_s - at_s < _WINDOW_S] + [now_s]
        words = self._last_words.pop(worker, "")
        return f"{how}: {words}" if words else how

    @property
    def are_too_many(self) -> bool:
        """Whether workers keep dying, so that to start them again is no help."""
        return len(self._at_s) > self._most
