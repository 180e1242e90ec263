"""Waiting for a state in tests: by yielding to the event loop, never by a fixed time."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable


async def until(condition: Callable[[], bool | Awaitable[bool]], *, timeout_s: float = 10.0) -> None:
    """Return once ``condition`` holds; it is asked again each time the loop has come round."""
    async with asyncio.timeout(timeout_s):
        for _ in itertools.count():
            answer = condition()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(0)
