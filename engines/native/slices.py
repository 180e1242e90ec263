"""What a worker does besides steps, in small pieces: one runs after each step, or whenever the inbox is empty."""

import time
from collections import deque
from collections.abc import Callable, Iterable

from engines.failpoints import FailpointHit
from engines.native import messages as m

Piece = Callable[[], None]


class Slices:
    """Pieces in their order, each of a handover, by its number. Used on the worker's main thread.

    Args:
        report: Tells the core.
    """

    def __init__(self, *, worker: int, report: Callable[[m.Failed], None]) -> None:
        self._worker = worker
        self._report = report
        self._pieces: deque[tuple[int, Piece]] = deque()
        self.longest_s = 0.0  # of this thread's time

    @property
    def are_waiting(self) -> bool:
        return bool(self._pieces)

    def add(self, handover: int, pieces: Iterable[Piece]) -> None:
        """Have ``pieces`` done after those that wait."""
        self._pieces.extend((handover, piece) for piece in pieces)

    def forget(self, handover: int) -> None:
        """Drop what waits of a handover."""
        self._pieces = deque(each for each in self._pieces if each[0] != handover)

    def run_one(self) -> None:
        """Do the first of those that wait."""
        started_s = time.thread_time()
        self.attempt(*self._pieces.popleft())
        self.longest_s = max(self.longest_s, time.thread_time() - started_s)

    def attempt(self, handover: int, work: Piece) -> None:
        """Do a piece of a handover now; if it fails, the handover fails and the worker goes on."""
        try:
            work()
        except (FailpointHit, OSError, KeyError, ValueError, RuntimeError) as error:
            self.forget(handover)
            reason = f"{type(error).__name__}: {error}"
            self._report(m.Failed(worker=self._worker, handover=handover, reason=reason))
