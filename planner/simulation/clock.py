"""Simulated time: what is due is done in order of time, and of equal times in the order in which it was asked for."""

from collections.abc import Callable
from heapq import heappop, heappush
from math import inf

Due = Callable[[], None]


class Clock:
    """The one owner of simulated time, which starts at 0 s."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self._due: list[tuple[float, int, Due]] = []

    @property
    def next_s(self) -> float:
        """When something is due next; ``inf``: nothing is."""
        return self._due[0][0] if self._due else inf

    def at(self, when_s: float, what: Due) -> None:
        """Have something done at a time, now if that has passed."""
        self.events += 1
        heappush(self._due, (max(when_s, self.now_s), self.events, what))

    def run(self, *, until_s: float) -> None:
        """Do all that is due up to ``until_s``, which is the time afterwards."""
        due = self._due
        while due and due[0][0] <= until_s:
            self.now_s, _, what = heappop(due)
            what()
        self.now_s = max(self.now_s, until_s)
