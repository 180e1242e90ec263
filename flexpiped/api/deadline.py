"""``X-Request-Deadline-Ms``: how long a client will wait for the whole of its answer, from its arrival on.

Of a request for an engine's own server only the waiting for its turn counts.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Final

from aiohttp import web

from engines.closing import closing
from flexpiped.api.errors import invalid, too_late
from flexpiped.api.generation import Piece

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


def until(deadline_s: float, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """Pass the pieces on until the deadline.

    Raises:
        ApiError: 503, it has come before the last of them.
    """
    return pieces if math.isinf(deadline_s) else _until(deadline_s, pieces)


async def _until(deadline_s: float, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    async with closing(pieces):
        while True:
            try:
                async with asyncio.timeout_at(deadline_s):
                    piece = await anext(pieces)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise too_late(f"the answer was not complete when {HEADER} had passed") from None
            yield piece
