"""``X-Request-Deadline-Ms``: how long a client will wait for the whole of its answer, from its arrival on.

A scope keeps to the deadline until the answer begins, and being late is a status then; a second one takes over where it
has begun, and being late is an event of the stream.
"""

import asyncio
import math
from typing import Any, Final

from aiohttp import web

from flexpiped.api.errors import ApiError, ClientStoppedReading, invalid, too_late

HEADER: Final = "X-Request-Deadline-Ms"
LONGEST_MS: Final = 24 * 3600 * 1000


def deadline_of(http: web.Request) -> float:
    """Return when the answer must be complete, by the clock of the event loop; infinity where the client says nothing.

    Raises:
        ApiError: 400, the header is no number of milliseconds.
    """
    given = http.headers.get(HEADER)
    if given is None:
        return math.inf
    if not (given.isascii() and given.isdecimal()) or len(given) > 8 or not 1 <= int(given) <= LONGEST_MS:
        message = f"{HEADER} must be a whole number of milliseconds, 1 to {LONGEST_MS}"
        raise invalid(message, param=HEADER, code="invalid_value")
    return asyncio.get_running_loop().time() + int(given) / 1000


class InTime:
    """Keeps a scope to the deadline, until ``InMidStream`` takes over the limit that it yields.

    Raises:
        ApiError: 503, the deadline has come first.
    """

    def __init__(self, deadline_s: float) -> None:
        self._limit = asyncio.timeout_at(None if math.isinf(deadline_s) else deadline_s)

    async def __aenter__(self) -> asyncio.Timeout:
        return await self._limit.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._limit.__aexit__(*raised)
        except TimeoutError:
            raise _late() from None


class InMidStream:
    """Takes a limit over for what is sent, which may wait for the client for ever: after the scope it holds no more.

    Raises:
        ApiError: 503, the deadline has come first.
        ClientStoppedReading: Likewise, and nothing more can be said to the client.
    """

    def __init__(self, limit: asyncio.Timeout, http: web.Request) -> None:
        self._limit, self._rest = limit, asyncio.timeout_at(limit.when())
        self._http = http

    async def __aenter__(self) -> None:
        self._limit.reschedule(None)
        await self._rest.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._rest.__aexit__(*raised)
        except TimeoutError:
            if self._http.protocol.writing_paused:
                raise ClientStoppedReading from None
            raise _late() from None


def _late() -> ApiError:
    return too_late(f"the answer was not complete when {HEADER} had passed")
