"""Engines of this daemon start one after the other, each when what ended engines held on its devices is free."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Final
from weakref import WeakKeyDictionary

from engines.served.freed import Departed, ProcessId

_FREE_DEADLINE_S: Final = 30.0
_DEPARTED: Final = Departed()  # of this daemon, whose restarts and second instances share devices
_STARTS: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock]] = WeakKeyDictionary()


@asynccontextmanager
async def turn_to_start(device_ids: Collection[str]) -> AsyncIterator[None]:
    """Return the scope of a start: two that load at once would each measure the other's memory.

    Raises:
        EngineStartFailed: The memory of an engine that has ended does not get free.
    """
    lock = _STARTS.setdefault(asyncio.get_running_loop(), asyncio.Lock())
    async with lock:
        await _DEPARTED.ensure_free(device_ids, deadline_s=_FREE_DEADLINE_S)
        yield


def note_departure(device_ids: Collection[str], processes: Collection[ProcessId]) -> None:
    """An engine with these processes has ended on these devices."""
    _DEPARTED.note(device_ids, processes)
