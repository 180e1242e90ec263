"""Changes how many KV blocks there are while steps run: no step waits for it, and no sequence fails.

    shrink: what is given out ends at the new capacity --> KV blocks above it are copied below, a few between two steps,
            the youngest sequences giving way where that is full --> the pages above are given back, slice by slice
    grow:   workers learn the bound --> once all have answered, KV blocks up to it are given out; in the host's memory
            pages come with the first write, on a device the workers allocate before they answer

A copy needs no answer: workers take what the core sends in order, so it is done before the next step that reads it.
Only sequences that are not in flight are moved, and their targets are free, so that steps under way see neither.

Where devices have budgets, a layout has a number of its own. A handover shrinks to what both layouts can hold together
before it loads anything, and grows to what the layout in force has once the other one is freed.
"""

import asyncio
from collections.abc import Callable

import numpy as np

from engines.errors import RefactoringBusy, RefactoringRefused
from engines.native import messages as m
from engines.native.inquiries import Inquiries
from engines.native.scheduler import Scheduler
from engines.native.shared import SharedMemory
from engines.native.workers import WorkerPool
from engines.offers import KvRange

_ANSWER_S = 30.0  # to give memory back or to get it; a worker that is lost meanwhile has none left anyway


class KvResizer:
    """One change at a time.

    Args:
        least: The longest sequence must fit, else it would wait for ever.
        blocks_at_once: So many are copied between two steps.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        inquiries: Inquiries,
        pool: WorkerPool,
        shared: SharedMemory,
        least: int,
        block_tokens: int,
        blocks_at_once: int,
    ) -> None:
        self._scheduler = scheduler
        self._inquiries = inquiries
        self._pool = pool
        self._shared = shared
        self._block_tokens = block_tokens
        self._blocks_at_once = blocks_at_once
        self.range = KvRange(least_blocks=least, most_blocks=scheduler.kv_capacity)
        self._asked: int | None = None  # for how many ``resize`` was called last; None: for all there are
        self._settled: asyncio.Future[None] | None = None
        self.is_under_way = False

    async def resize(self, capacity: int, *, pump: Callable[[], None]) -> int:
        """Have ``capacity`` KV blocks; ``pump`` lets steps go on. Return the bytes given back.

        Raises:
            RefactoringBusy: Another change is under way.
            RefactoringRefused: There cannot be as many, or as few.
        """
        if self.is_under_way:
            raise RefactoringBusy("the number of KV blocks is being changed")
        least, most = self.range.least_blocks, self.range.most_blocks
        if not least <= capacity <= most:
            raise RefactoringRefused(f"there can be {least} to {most} KV blocks, not {capacity}")
        self._asked = None if capacity == most else capacity
        return await self._change(capacity, pump=pump)

    async def make_way(self, most: int, *, pump: Callable[[], None]) -> None:
        """Have no more than so many until ``follow``: two layouts exist for a while."""
        if most < self._scheduler.kv_capacity:
            await self._change(most, pump=pump)

    async def follow(self, most: int, *, pump: Callable[[], None]) -> None:
        """Have the ``most`` of the layout in force, or what others' memory has bounded it to.

        Raises:
            RefactoringBusy: There was no memory for more of them; ``resize`` may get it later.
        """
        self.range = KvRange(least_blocks=self.range.least_blocks, most_blocks=most)
        capacity = most if self._asked is None else min(self._asked, most)
        if capacity != self._scheduler.kv_capacity:
            await self._change(capacity, pump=pump)

    async def _change(self, capacity: int, *, pump: Callable[[], None]) -> int:
        self.is_under_way = True
        try:
            is_less = capacity < self._scheduler.kv_capacity
            if is_less:
                self._scheduler.resize_kv(capacity)
                await self._settle(pump)
            # Before anything is written above it: what is still to be given back there is then kept.
            returned_bytes = await self._bound(self._slots(capacity))
            if not is_less:
                self._scheduler.resize_kv(capacity)
                pump()
            return returned_bytes
        finally:
            self.is_under_way = False

    def between_steps(self, workers: list[int]) -> None:
        """Copy some KV blocks below the bound, in the workers that carry stages. Called before steps are scheduled."""
        if self._settled is None:
            return
        pairs = self._scheduler.relocate(self._blocks_at_once)
        if pairs:
            sources, targets = np.array(pairs, dtype=np.int32).T
            move = m.MoveKv(sources=sources.tobytes(), targets=targets.tobytes())
            for worker in workers:
                self._pool.send(worker, move)
        if not self._scheduler.kv_blocks_above and not self._settled.done():
            self._settled.set_result(None)

    async def _bound(self, end_slot: int) -> int:
        """Tell all workers; return what they gave back. One that is lost meanwhile begins with the new bound."""
        before, self._shared.kv_end_slot = self._shared.kv_end_slot, end_slot
        answers = [self._inquiries.bound_kv(worker, end_slot) for worker in range(self._pool.size)]
        done, silent = await asyncio.wait(answers, timeout=_ANSWER_S)
        found = [each.result() for each in done if not each.cancelled()]
        refusals = [each.refusal for each in found if each.refusal]
        refusals += [f"{len(silent)} workers had no memory for more KV blocks within {_ANSWER_S:.0f} s"] * bool(silent)
        if refusals and end_slot > before:
            self._shared.kv_end_slot = before
            for worker in range(self._pool.size):  # those that have got it have no use for it
                self._inquiries.bound_kv(worker, before)
            raise RefactoringBusy(refusals[0])
        return sum(each.returned_bytes for each in found)

    async def _settle(self, pump: Callable[[], None]) -> None:
        self._settled = asyncio.get_running_loop().create_future()
        try:
            pump()
            await self._settled
        finally:
            self._settled = None

    def _slots(self, capacity: int) -> int:
        return (capacity + 1) * self._block_tokens  # KV block 0 comes before them
