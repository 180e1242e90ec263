"""Waiting for a state in tests: by yielding to the event loop, and in real time by short sleeps once it takes long."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from tests.support.virtual_time import VirtualTimeLoop

_SOON_S: Final = 0.25
_PAUSE_S: Final = 0.002  # engines that boot or recover meanwhile want the processor


async def until(condition: Callable[[], bool | Awaitable[bool]], *, timeout_s: float = 60.0) -> None:
    """Return once ``condition`` holds; it is asked again each time the loop has come round, at first.

    ``timeout_s`` only ends what would never end: machines that run tests may be busy.
    """
    began_s = time.monotonic()
    has_real_time = not isinstance(asyncio.get_running_loop(), VirtualTimeLoop)
    async with asyncio.timeout(timeout_s):
        while True:
            answer = condition()
            if answer if isinstance(answer, bool) else await answer:
                return
            takes_long = has_real_time and time.monotonic() - began_s > _SOON_S
            await asyncio.sleep(_PAUSE_S if takes_long else 0)
