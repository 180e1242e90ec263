"""An engine is idle when it has no request, and when nobody here takes tokens of one any more."""

from dataclasses import replace

from engines.draining import until_drained
from engines.protocol import EngineCounters
from tests.support.metrics import COUNTERS


class Busy:
    """Has a request running, then one waiting, then none; streams end later still."""

    def __init__(self) -> None:
        self.asked = 0
        self.streams = {1}

    async def counters(self) -> EngineCounters:
        self.asked += 1
        running, waiting = [(1, 0), (0, 1), (0, 0), (0, 0)][self.asked - 1]
        if self.asked == 4:
            self.streams.clear()
        return replace(COUNTERS, running=running, waiting=waiting)


async def test_it_waits_for_requests_and_for_streams() -> None:
    busy = Busy()
    await until_drained(busy.counters, has_streams=lambda: bool(busy.streams), poll_s=1.0)
    assert busy.asked == 4


async def test_an_idle_engine_is_asked_once() -> None:
    asked = []

    async def counters() -> EngineCounters:
        asked.append("counters")
        return replace(COUNTERS, running=0, waiting=0)

    await until_drained(counters, has_streams=lambda: False, poll_s=1.0)
    assert asked == ["counters"]
