"""Keeps a handover's KV caches moving: the next one is carried, and the last one let go, while a request waits.

Each step with an instance waits for a step of that instance. One after the other, they would make the take-over of many
requests several times as long as it has to be; the next request runs on while its KV cache is carried.
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass

from engines.protocol import Engine
from flexpiped.flight import Flight
from flexpiped.kv_carrier import Carried, KvCarrier


@dataclass(frozen=True, slots=True)
class _Ahead:
    flight: Flight
    first: Engine
    second: Engine
    work: "asyncio.Task[Carried]"


class KvAhead:
    """One handover's. ``settle`` comes last, however the handover ends."""

    def __init__(self, carrier: KvCarrier) -> None:
        self._carrier = carrier
        self._ahead: _Ahead | None = None
        self._dropping: set[asyncio.Task[None]] = set()

    def begin(self, flight: Flight, *, first: Engine, second: Engine) -> None:
        """Begin to carry the KV cache of the request whose turn is next, unless its way is yet to be measured."""
        if self._ahead is not None or not self._carrier.can_look_ahead or flight.engine is not first:
            return
        carrying = self._carrier.carry(flight.request_id, num_tokens=flight.num_tokens, first=first, second=second)
        self._ahead = _Ahead(flight, first, second, asyncio.create_task(carrying, name="kv-ahead"))

    async def carry(self, flight: Flight, *, first: Engine, second: Engine) -> Carried:
        """Return how a request's KV cache goes over: as begun, or from the start."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (ahead.flight, ahead.first, ahead.second) == (flight, first, second):
            try:
                return await asyncio.shield(ahead.work)
            except BaseException:
                self._give_up(ahead)
                raise
        if ahead is not None:
            self._give_up(ahead)
        return await self._carrier.carry(flight.request_id, num_tokens=flight.num_tokens, first=first, second=second)

    def drop(self, carried: Carried, *, first: Engine, second: Engine) -> None:
        """Have both instances let go of what was carried, in their own time."""
        self._start(self._carrier.drop(carried, first=first, second=second))

    async def settle(self) -> None:
        """Return when nothing is carried and nothing is left to let go of."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._give_up(ahead)
        while self._dropping:
            await asyncio.wait(self._dropping)

    def _give_up(self, ahead: _Ahead) -> None:
        ahead.work.cancel()
        self._start(self._drop_ahead(ahead))

    async def _drop_ahead(self, ahead: _Ahead) -> None:
        await asyncio.wait([ahead.work])
        if not ahead.work.cancelled() and ahead.work.exception() is None:
            await self._carrier.drop(ahead.work.result(), first=ahead.first, second=ahead.second)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name="kv-drop")
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)
