"""Questions that the core asks its workers, and their answers when they come."""

import asyncio
import time
from itertools import count
from typing import TypeVar

from engines.busy import BusyShares
from engines.native import messages as m
from engines.native.workers import WorkerPool

T = TypeVar("T")


class Inquiries:
    """Each question has a ticket; the answer with that ticket settles its future."""

    def __init__(self, pool: WorkerPool, tickets: "count[int]") -> None:
        self._pool = pool
        self._tickets = tickets
        self._stats: dict[tuple[int, int], asyncio.Future[m.Stats]] = {}  # by worker and ticket
        self._checksums: dict[tuple[int, int], asyncio.Future[list[int]]] = {}
        self._steps: dict[tuple[int, int], asyncio.Future[m.Steps]] = {}
        self._bounds: dict[tuple[int, int], asyncio.Future[m.KvBounded]] = {}
        self._busy = BusyShares(clock=time.monotonic)

    def stats(self, worker: int) -> asyncio.Future[m.Stats]:
        """Ask for counters."""
        ticket = next(self._tickets)
        future = self._stats[worker, ticket] = asyncio.get_running_loop().create_future()
        self._pool.send(worker, m.ReadStats(ticket=ticket))
        return future

    def checksums(self, worker: int, decoders: list[int], blocks: list[tuple[int, int]]) -> asyncio.Future[list[int]]:
        """Ask for the checksums of KV blocks (id, valid token slots), decoders outermost."""
        ticket = next(self._tickets)
        future = self._checksums[worker, ticket] = asyncio.get_running_loop().create_future()
        self._pool.send(worker, m.Checksum(ticket=ticket, decoders=decoders, blocks=blocks))
        return future

    def steps(self, worker: int) -> asyncio.Future[m.Steps]:
        """Ask what the worker's stage computed lately."""
        ticket = next(self._tickets)
        future = self._steps[worker, ticket] = asyncio.get_running_loop().create_future()
        self._pool.send(worker, m.ReadSteps(ticket=ticket))
        return future

    def bound_kv(self, worker: int, end_slot: int) -> asyncio.Future[m.KvBounded]:
        """Have memory for the token slots below it, and that of those from there on given back."""
        ticket = next(self._tickets)
        future = self._bounds[worker, ticket] = asyncio.get_running_loop().create_future()
        self._pool.send(worker, m.BoundKv(ticket=ticket, end_slot=end_slot))
        return future

    async def answers_within(self, worker: int, deadline_s: float) -> bool:
        """Say whether a worker answers at all."""
        try:
            await asyncio.wait_for(self.stats(worker), deadline_s)
        except (TimeoutError, asyncio.CancelledError):
            return False
        return True

    def settle(self, report: m.Stats | m.Checksums | m.Steps | m.KvBounded) -> None:
        """Take in an answer; one that nobody waits for any more is dropped."""
        match report:
            case m.Stats():
                settle(self._stats.pop((report.worker, report.ticket), None), report)
            case m.Checksums():
                settle(self._checksums.pop((report.worker, report.ticket), None), report.values)
            case m.KvBounded():
                settle(self._bounds.pop((report.worker, report.ticket), None), report)
            case m.Steps():
                settle(self._steps.pop((report.worker, report.ticket), None), report)

    def failed(self, report: m.Failed) -> bool:
        """Take in that a worker could not do what it was asked; False: that was no question."""
        waiting = self._bounds.pop((report.worker, report.handover), None)
        answer = m.KvBounded(worker=report.worker, ticket=report.handover, returned_bytes=0, refusal=report.reason)
        settle(waiting, answer)
        return waiting is not None

    def forget(self, worker: int) -> None:
        """A worker has died: its answers will not come."""
        for waiting in (self._stats, self._checksums, self._steps, self._bounds):
            for key in [key for key in waiting if key[0] == worker]:
                waiting.pop(key).cancel()

    def busy_share(self, stats: m.Stats) -> float | None:
        """Return the share of time that a worker computes, None at its first reading."""
        return self._busy.share(stats.worker, stats.busy_s)


def settle(future: "asyncio.Future[T] | None", value: T) -> None:
    """Give a future its value, if it still waits for one."""
    if future is not None and not future.done():
        future.set_result(value)
