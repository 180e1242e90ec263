"""Waiting for the last request of an engine that is asked what it has."""

import asyncio
from collections.abc import Awaitable, Callable

from engines.protocol import EngineCounters


async def until_drained(
    counters: Callable[[], Awaitable[EngineCounters]], *, has_streams: Callable[[], bool], poll_s: float
) -> None:
    """Return when the engine has no request, and nobody here still takes tokens of one."""
    while True:
        now = await counters()
        if now.running + now.waiting == 0 and not has_streams():
            return
        await asyncio.sleep(poll_s)
