"""How late the event loop is: what one turn of it takes too long is added to every token that waits for the next."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import Metric

# Ten readings a second: enough for a p99 over a minute, and too few to be seen in the CPU time of an idle daemon.
INTERVAL_S: Final = 0.1
# The loop's timers are whole milliseconds, so nothing below two of them says anything.
_BUCKETS_S: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class LoopLag:
    """Wakes up regularly and notes how much later than asked for that was. Used on the loop that it watches."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._registry = CollectorRegistry(auto_describe=False)
        self._late_s = Histogram(
            "flexpiped_event_loop_lag_seconds",
            "How much later than it should the event loop came to its next work, ten times a second",
            buckets=_BUCKETS_S,
            registry=self._registry,
        )

    async def watch_forever(self) -> None:
        """Take readings until cancelled."""
        while True:
            due_s = self._clock() + INTERVAL_S
            await self._sleep(INTERVAL_S)
            self._late_s.observe(max(0.0, self._clock() - due_s))

    def families(self) -> Iterable[Metric]:
        """Return the readings so far, for Prometheus."""
        return self._registry.collect()
