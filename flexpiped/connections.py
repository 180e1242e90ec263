"""HTTP connections: how large and how slow requests and their readers may be, and errors that no handler sees.

aiohttp would log the bytes that it does not understand, which may be a key, and answer in words of its own.
"""

import asyncio
import math
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, BadHttpMethod, ContentEncodingError, LineTooLong

from flexpiped import log_events
from flexpiped.api.errors import ClientStoppedReading, from_http_status

_TOO_LARGE: Final = 431  # Request Header Fields Too Large
_UNSUPPORTED_MEDIA_TYPE: Final = 415


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What a client may take before its request is known, and while it is answered.

    ``header_deadline_s``: from when a connection is made, or its last answer was sent, the whole head of its next
    request must have come in this time; else it is closed. ``max_header_line_bytes``: of the request line and of each
    header, of which there may be 128. ``send_deadline_s``: see ``SendWatch``; infinite: none.
    """

    header_deadline_s: float = 75.0
    max_header_line_bytes: int = 8192
    send_deadline_s: float = math.inf


class SendWatch:
    """Ends a connection whose client takes nothing of what waits to be sent to it, ``deadline_s`` long.

    A handler that writes waits only while more waits than the transport wants to hold, and only then is there a timer:
    what is sent to a client that reads costs nothing more. The end of the connection cancels the handler, which gives
    back all that its request has.
    """

    __slots__ = ("_deadline_s", "_timer")

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, transport: asyncio.Transport) -> None:
        """More waits now than the transport wants to hold."""
        if not math.isinf(self._deadline_s):
            self._look_later(transport, transport.get_write_buffer_size())

    def end(self) -> None:
        """No more than that waits, or the connection is gone. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self, transport: asyncio.Transport, waiting_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._deadline_s, self._look, transport, waiting_bytes)

    def _look(self, transport: asyncio.Transport, before_bytes: int) -> None:
        """Where less waits than before the client reads; where more does, the handler is not held up by it yet."""
        waiting_bytes = transport.get_write_buffer_size()
        if waiting_bytes != before_bytes:
            self._look_later(transport, waiting_bytes)
            return
        self._timer = None
        give_up(transport)


def give_up(transport: asyncio.Transport) -> None:
    """Close a connection without sending what waits, which nobody takes."""
    log_events.client_stopped_reading(waiting_bytes=transport.get_write_buffer_size())
    transport.abort()


class Runner(web.AppRunner):
    """Runs an application on connections of ours; a client that leaves cancels its handler."""

    def __init__(self, app: web.Application, *, limits: ConnectionLimits, shutdown_s: float) -> None:
        super().__init__(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=shutdown_s,
            keepalive_timeout=limits.header_deadline_s,
            max_line_size=limits.max_header_line_bytes,
            max_field_size=limits.max_header_line_bytes,
            tcp_keepalive=False,  # accepted connections have it from the socket that listens
            send_deadline_s=limits.send_deadline_s,  # aiohttp hands on to a connection what it does not know
        )

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return _Server(
            _refused_in_one_shape(server.request_handler),
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            **server._kwargs,
        )


def _refused_in_one_shape(
    handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    """Answer in OpenAI's shape what the framework refuses before any middleware: an unknown ``Expect``."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handle(request)
        except web.HTTPExpectationFailed as refused:
            body = from_http_status(refused.status, message="Expect: only 100-continue is known here").encode()
            return web.Response(status=refused.status, body=body, content_type="application/json")

    return answer


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ("_watch",)

    def __init__(self, manager: web.Server, *, send_deadline_s: float, **options: Any) -> None:
        super().__init__(manager, **options)
        self._watch = SendWatch(send_deadline_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.transport is not None:
            self._watch.begin(self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch.end()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._watch.end()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002  the base class has it
    ) -> web.StreamResponse:
        """Answer in OpenAI's shape. Of an error of ours the log has where it was, and of a client's nothing.

        What either says in words may be a part of the request.
        """
        if isinstance(exc, ClientStoppedReading):
            if self.transport is not None:
                give_up(self.transport)
            raise ConnectionError("the client does not read") from exc
        if status >= 500:
            frames = traceback.format_tb(exc.__traceback__) if exc is not None else []
            log_events.request_failed(method=request.method, error=type(exc).__name__, frames=frames)
            said = "the server failed at this request; its log says where"
        else:
            status, said = _told(exc, status)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, so there cannot be another one")
        body = from_http_status(status, message=said).encode()
        response = web.Response(status=status, body=body, content_type="application/json")
        response.force_close()
        return response

    def log_exception(self, *_args: Any, **_kwargs: Any) -> None:
        """Say nothing: ``handle_error`` has told what matters, and the rest is how a client behaved."""


def _told(error: BaseException | None, status: int) -> tuple[int, str]:
    """Return status and words for a request that could not be read. aiohttp's words may have a part of it in them."""
    match error:
        case LineTooLong():
            return _TOO_LARGE, "a line of the request's head is too long"
        case ContentEncodingError():
            return _UNSUPPORTED_MEDIA_TYPE, "the body's Content-Encoding is not known here; gzip and deflate are"
        case BadHttpMethod():
            return status, "the request's method is none of HTTP's"
        case BadHttpMessage(message="Too many headers received"):
            return _TOO_LARGE, "the request's head has too many lines: 128 headers are taken"
        case BadHttpMessage(message="Missing 'Host' header in request."):
            return status, "the request has no Host header"
        case _:
            return status, "this is not valid HTTP"
