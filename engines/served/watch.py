"""Looks after an engine about once a second: is there work, and does it go on?"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from engines.errors import EngineClosed, EngineDied, EngineError
from engines.protocol import EngineCounters
from engines.served.hang import Pulse

_PULSE_S: Final = 1.0


class HangWatch:
    """One engine's. A look that is not answered is work that does not go on, too.

    Args:
        deadline_s: Without progress while work is pending.
        patience_s: The same after the engine said that it loads or compiles.
        counters: Asks the engine; an error that is no end of it is no progress either.
        has_requests: Whether requests are in flight.
        on_hung: Told in words, once it hangs.
    """

    def __init__(
        self,
        *,
        deadline_s: float,
        patience_s: float,
        counters: Callable[[], Awaitable[EngineCounters]],
        has_requests: Callable[[], bool],
        on_hung: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._pulse = Pulse(deadline_s=deadline_s, patience_s=patience_s)
        self._poll_s = min(_PULSE_S, deadline_s / 2)
        self._counters = counters
        self._has_requests = has_requests
        self._on_hung = on_hung
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """The engine serves."""
        self._task = asyncio.create_task(self._watch(), name="engine-pulse")

    async def stop(self) -> None:
        """Look no more. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def progressed(self) -> None:
        """A token came."""
        self._pulse = self._pulse.progressed(now_s=self._clock())

    def works_slowly(self) -> None:
        """The engine said that it loads or compiles."""
        self._pulse = self._pulse.working_slowly(now_s=self._clock())

    async def _watch(self) -> None:
        while True:
            looking = asyncio.ensure_future(self._counters())
            try:
                if not await self._look(looking):
                    return
            finally:
                looking.cancel()
            await asyncio.sleep(_PULSE_S)

    async def _look(self, looking: asyncio.Future[EngineCounters]) -> bool:
        """Wait for one look, and meanwhile for a hang. False: the engine hangs or has ended."""
        while not looking.done():
            await asyncio.wait([looking], timeout=self._poll_s)
            now_s, pending = self._clock(), self._has_requests() or not looking.done()
            try:
                steps = looking.result().steps_total if looking.done() else None
            except (EngineDied, EngineClosed):
                return False
            except EngineError:
                steps = None
            self._pulse = self._pulse.seen(pending=pending, steps_total=steps, now_s=now_s)
            if (verdict := self._pulse.verdict(now_s=now_s)) is not None:
                self._on_hung(verdict)
                return False
        return True
