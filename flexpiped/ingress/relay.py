"""What an ingress process does not answer by itself: passed on to the daemon as it is, and the answer as it comes.

The daemon listens on a Unix socket with the same application that it has at the HTTP port where it serves that itself,
so such a request is checked, counted and answered there as ever, keys included.
"""

from pathlib import Path
from typing import Final

from aiohttp import ClientConnectionResetError, web

from flexpiped.api.errors import unavailable
from flexpiped.api.handlers import read_body
from flexpiped.api.hop_headers import NOT_ANSWERED, OF_ONE_HOP, without
from flexpiped.api.own_answer import Answer, asked

_NOT_ASKED: Final = OF_ONE_HOP | {"content-encoding"}  # the body was decompressed here
_STREAMED: Final = "text/event-stream"


class Relay:
    """Passes requests on to the daemon, which listens at ``socket``."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def passed_on(self, http: web.Request) -> web.StreamResponse:
        """Answer as the daemon does. A client that leaves ends the request there, too.

        Raises:
            ApiError: 503, the daemon does not answer; 408, the body does not come.
        """
        body = await read_body(http)
        headers = [*without(_NOT_ASKED, http.headers), ("Connection", "close")]
        try:
            with await asked(
                self._socket, method=http.method, target=http.path_qs, headers=headers, body=body
            ) as answer:
                return await _answered(http, answer)
        except OSError as error:
            raise unavailable(f"the daemon does not answer: {error}", code="shutting_down") from error


async def _answered(http: web.Request, answer: Answer) -> web.StreamResponse:
    headers = without(NOT_ANSWERED, answer.headers)
    if http.method == "HEAD":
        length = answer.headers.get("Content-Length")
        return web.Response(status=answer.status, headers=[*headers, *([("Content-Length", length)] if length else [])])
    if answer.content_type != _STREAMED:
        return web.Response(status=answer.status, body=await answer.read(), headers=headers)
    return await _passed_on(http, web.StreamResponse(status=answer.status, headers=headers), answer)


async def _passed_on(http: web.Request, response: web.StreamResponse, answer: Answer) -> web.StreamResponse:
    """Send what comes. A stream that breaks off there breaks off here: its end would say that it is whole."""
    try:
        await response.prepare(http)
        while part := await answer.more():
            await response.write(part)
    except ClientConnectionResetError:
        pass
    except OSError:
        if http.transport is not None:
            http.transport.abort()
    return response
