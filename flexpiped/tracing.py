"""One trace per request: what is noted of it on its way, from its arrival to its last token. No tracing library here.

``traced`` is the application's middleware: it begins a trace, which the request's own task carries along, and ends it.
``TracedLoad`` is told by the API's metrics what becomes of the request, and notes when. Where nobody collects traces
there is no middleware, and nothing is noted.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from time import monotonic_ns, time_ns
from typing import Final, Protocol

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from flexpiped.api.errors import ClientStoppedReading
from flexpiped.api.metrics import RequestListener
from flexpiped.events import Event, EventKind

_HANDOVERS_KEPT: Final = 100
_AHEAD_NS: Final = time_ns() - monotonic_ns()  # one clock for all times: what is noted later is never earlier


def now_ns() -> int:
    """Return nanoseconds since 1970 that never go back."""
    return monotonic_ns() + _AHEAD_NS


@dataclass(slots=True, kw_only=True)
class RequestTrace:
    """What is noted of one request. Times are those of ``now_ns``; None: it did not come so far.

    ``headers`` are what an engine's own server gets, so that its spans belong to this trace. There is nothing here of
    what the request says.
    """

    name: str
    headers: Mapping[str, str]
    began_ns: int
    model: str = ""  # which it is for, once that is known
    admitted_ns: int | None = None
    first_token_ns: int | None = None
    last_token_ns: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(slots=True, kw_only=True)
class HandoverTrace:
    """One handover; ``ended_ns`` None: it is under way."""

    number: int
    what: str
    began_ns: int
    ended_ns: int | None = None
    result: str = ""


class Spans(Protocol):
    """Makes spans of what was noted."""

    def begin(self, name: str, *, headers: Mapping[str, str], began_ns: int) -> RequestTrace:
        """Begin a trace, or go on with the one that ``headers`` name."""

    def end(self, trace: RequestTrace, *, status: int | None, handovers: tuple[HandoverTrace, ...]) -> None:
        """End it. ``status`` None: the client left, or does not read."""


_CURRENT: Final[ContextVar[RequestTrace | None]] = ContextVar("trace", default=None)


def headers_to_pass_on() -> Mapping[str, str]:
    """Return the context of the current request's trace, as headers; none where nothing is traced."""
    trace = _CURRENT.get()
    return {} if trace is None else trace.headers


def note_model(name: str) -> None:
    """Note which model the current request is for; nothing where nothing is traced."""
    if (trace := _CURRENT.get()) is not None:
        trace.model = name


class Handovers:
    """The last handovers, from events: requests that were in flight meanwhile have them in their traces."""

    def __init__(self) -> None:
        self._known: deque[HandoverTrace] = deque(maxlen=_HANDOVERS_KEPT)

    def note(self, event: Event) -> None:
        """Take one event of any kind."""
        if event.kind is not EventKind.REFACTORING:
            return
        number, state = event.fields["handover"], event.fields["state"]
        if state == "plan":
            self._known.append(HandoverTrace(number=number, what=event.fields["what"], began_ns=now_ns()))
        elif state == "ended":
            for each in self._known:
                if each.number == number:
                    each.ended_ns, each.result = now_ns(), event.fields["record"]["result"]

    def during(self, began_ns: int, ended_ns: int) -> tuple[HandoverTrace, ...]:
        """Return those that were under way at some moment between the two."""
        return tuple(
            each
            for each in self._known
            if each.began_ns <= ended_ns and (each.ended_ns is None or each.ended_ns >= began_ns)
        )


class TracedLoad:
    """A ``RequestListener`` that notes when things happened, and passes them on to another one."""

    def __init__(self, listener: RequestListener) -> None:
        self._listener = listener

    def arrived(self, request: object) -> None:
        """It came."""
        self._listener.arrived(request)

    def admitted(self, request: object) -> None:
        """It waits no longer."""
        self._listener.admitted(request)
        if (trace := _CURRENT.get()) is not None:
            trace.admitted_ns = now_ns()

    def first_token(self, request: object) -> None:
        """Its answer has begun."""
        self._listener.first_token(request)
        if (trace := _CURRENT.get()) is not None:
            trace.first_token_ns = now_ns()

    def ended(
        self, request: object, *, prompt_tokens: int | None, output_tokens: int | None, tpot_s: float | None
    ) -> None:
        """It ended, on any path."""
        self._listener.ended(request, prompt_tokens=prompt_tokens, output_tokens=output_tokens, tpot_s=tpot_s)
        if (trace := _CURRENT.get()) is not None:
            trace.last_token_ns = now_ns()
            trace.prompt_tokens, trace.output_tokens = prompt_tokens, output_tokens


def traced(spans: Spans, *, handovers: Handovers, paths: frozenset[str]) -> Middleware:
    """Return the outermost middleware: it traces POST requests to ``paths``, whatever becomes of them."""

    @web.middleware
    async def trace_it(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != "POST" or request.path not in paths:
            return await handler(request)
        trace = spans.begin(f"POST {request.path}", headers=request.headers, began_ns=now_ns())
        before = _CURRENT.set(trace)
        status: int | None = HTTPStatus.INTERNAL_SERVER_ERROR  # until it is known better
        try:
            response = await handler(request)
            status = response.status
            return response
        except (asyncio.CancelledError, ClientStoppedReading):
            status = None
            raise
        finally:
            _CURRENT.reset(before)
            spans.end(trace, status=status, handovers=handovers.during(trace.began_ns, now_ns()))

    return trace_it
