"""HTTP connections: how large and how slow the head of a request may be, and errors that no handler sees.

aiohttp would log the bytes that it does not understand, which may be a key, and answer in words of its own.
"""

import traceback
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from flexpiped import log_events
from flexpiped.api.errors import from_http_status

_TOO_LARGE: Final = 431  # Request Header Fields Too Large


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What a client may take before its request is known.

    ``header_deadline_s``: from when a connection is made, or its last answer was sent, the whole head of its next
    request must have come in this time; else it is closed. ``max_header_line_bytes``: of the request line and of each
    header, of which there may be 128.
    """

    header_deadline_s: float = 75.0
    max_header_line_bytes: int = 8192


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
        )

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return _Server(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            **server._kwargs,
        )


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ()

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
        if status >= 500:
            frames = traceback.format_tb(exc.__traceback__) if exc is not None else []
            log_events.request_failed(method=request.method, error=type(exc).__name__, frames=frames)
            said = "the server failed at this request; its log says where"
        elif isinstance(exc, LineTooLong):
            status, said = _TOO_LARGE, "a line of the request's head is too long"
        else:
            said = "this is not valid HTTP"
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, so there cannot be another one")
        body = from_http_status(status, message=said).encode()
        response = web.Response(status=status, body=body, content_type="application/json")
        response.force_close()
        return response

    def log_exception(self, *_args: Any, **_kwargs: Any) -> None:
        """Say nothing: ``handle_error`` has told what matters, and the rest is how a client behaved."""
