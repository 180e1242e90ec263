"""Who waits for a place: by priority, then in the order of arrival. Nobody overtakes the first: it would never fit."""

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count


@dataclass(order=True, slots=True)
class _Waiter:
    order: tuple[int, int]  # less is sooner
    amount: int = field(compare=False)
    granted: "asyncio.Future[None]" = field(compare=False)


class WaitingLine:
    """One line for one kind of place. Used on one event loop.

    Args:
        fits: Says whether an amount can be taken now; ``take`` takes it.
    """

    def __init__(self, *, fits: Callable[[int], bool], take: Callable[[int], None]) -> None:
        self._fits = fits
        self._take = take
        self._heap: list[_Waiter] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._heap)

    def may_go_now(self, amount: int, *, priority: int) -> bool:
        """Say whether nobody of at least that priority waits, and the amount fits."""
        return self._fits(amount) and not (self._heap and self._heap[0].order[0] <= -priority)

    def go_now(self, amount: int, *, priority: int) -> bool:
        """Take the amount at once where ``may_go_now`` says so; say whether it was taken."""
        if not self.may_go_now(amount, priority=priority):
            return False
        self._take(amount)
        return True

    async def wait(self, amount: int, *, priority: int) -> None:
        """Return when the amount has been taken for the caller; leaving on any other path takes nothing."""
        waiter = _Waiter((-priority, next(self._numbers)), amount, asyncio.get_running_loop().create_future())
        heapq.heappush(self._heap, waiter)
        self.advance()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter in self._heap:
                self._heap.remove(waiter)
                heapq.heapify(self._heap)
            elif not waiter.granted.cancelled():
                self._take(-amount)  # it was granted in the same turn in which the caller left
            self.advance()
            raise

    def advance(self) -> None:
        """Let those go who fit now, first come first. One who has left, and has not noticed yet, gets nothing."""
        while self._heap and (self._heap[0].granted.cancelled() or self._fits(self._heap[0].amount)):
            waiter = heapq.heappop(self._heap)
            if not waiter.granted.cancelled():
                self._take(waiter.amount)
                waiter.granted.set_result(None)
