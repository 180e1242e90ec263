"""How late the event loop is, on a clock that a test winds."""

import asyncio
from contextlib import suppress

import pytest

from flexpiped.loop_lag import LoopLag


async def test_what_holds_the_loop_up_is_seen() -> None:
    now_s, late_s = 100.0, iter([0.0] * 10 + [0.3])

    async def sleep(duration_s: float) -> None:
        nonlocal now_s
        if (late := next(late_s, None)) is None:
            raise asyncio.CancelledError
        now_s += duration_s + late

    lag = LoopLag(clock=lambda: now_s, sleep=sleep)
    with suppress(asyncio.CancelledError):
        await lag.watch_forever()

    seen = {
        sample.name.removeprefix("flexpiped_event_loop_lag_seconds_") + sample.labels.get("le", ""): sample.value
        for family in lag.families()
        for sample in family.samples
    }
    assert (seen["count"], seen["bucket0.002"], seen["bucket0.2"], seen["bucket0.5"]) == (11, 10, 10, 11)
    assert seen["sum"] == pytest.approx(0.3)
