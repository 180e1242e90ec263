"""Answers of the admin API as JSON: what was asked for, events as lines, or an error."""

from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Final

import msgspec
from aiohttp import ClientConnectionResetError, web

from engines.errors import AdapterRefused, EngineError, RefactoringBusy, RefactoringRefused, UnsupportedByEngine
from flexpiped.events import Event, EventLog
from flexpiped.model_errors import ModelBusy, ModelError, UnknownModel, WhichModel
from planner.errors import InvalidLayout, NoFeasiblePlan, PlannerError, PlanTimeout
from topology.errors import NotMeasured

_NDJSON: Final = "application/x-ndjson"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# The first class that fits decides.
_CODES: Final[tuple[tuple[type[Exception], str, HTTPStatus], ...]] = (
    (RefactoringBusy, "busy", HTTPStatus.CONFLICT),
    (RefactoringRefused, "refused", HTTPStatus.CONFLICT),
    (UnsupportedByEngine, "unsupported", HTTPStatus.CONFLICT),
    (AdapterRefused, "refused", HTTPStatus.CONFLICT),
    (NoFeasiblePlan, "infeasible", HTTPStatus.CONFLICT),
    (InvalidLayout, "invalid_layout", HTTPStatus.CONFLICT),
    (PlanTimeout, "plan_timeout", HTTPStatus.GATEWAY_TIMEOUT),
    (PlannerError, "refused", HTTPStatus.CONFLICT),
    (EngineError, "engine_unavailable", HTTPStatus.SERVICE_UNAVAILABLE),
)


_MODEL_CODES: Final[tuple[tuple[type[ModelError], str, HTTPStatus], ...]] = (
    (UnknownModel, "unknown_model", HTTPStatus.NOT_FOUND),
    (WhichModel, "which_model", HTTPStatus.BAD_REQUEST),
    (ModelBusy, "busy", HTTPStatus.CONFLICT),
    (ModelError, "refused", HTTPStatus.CONFLICT),
)


def json_answer(value: object, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    """Return ``value`` as the whole answer."""
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def error_answer(code: str, message: str, status: HTTPStatus) -> web.Response:
    """Return an error that programs know by ``code``."""
    return json_answer({"error": {"code": code, "message": message}}, status)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer what handlers raise as errors that programs know."""
    try:
        return await handler(request)
    except (EngineError, PlannerError) as error:
        code, http_status = next((code, status) for kind, code, status in _CODES if isinstance(error, kind))
        return error_answer(code, str(error), http_status)
    except ModelError as error:
        code, http_status = next((code, status) for kind, code, status in _MODEL_CODES if isinstance(error, kind))
        return error_answer(code, str(error), http_status)
    except NotMeasured as error:
        return error_answer("not_kept", str(error), HTTPStatus.CONFLICT)
    except msgspec.MsgspecError as error:
        return error_answer("bad_request", str(error), HTTPStatus.BAD_REQUEST)
    except web.HTTPException as error:
        return error_answer("bad_request", error.reason, HTTPStatus(error.status))


async def send_log(request: web.Request, log: EventLog) -> web.StreamResponse:
    """Answer with the events of a log: ``?since=N``, and with ``?follow=1`` also those that come."""
    try:
        since = int(request.query.get("since", "0"))
    except ValueError:
        since = -1
    if since < 0:
        return error_answer("bad_request", "since must be a number of an event, or 0", HTTPStatus.BAD_REQUEST)
    if request.query.get("follow") == "1":
        return await stream_events(request, log.follow(since=since))
    lines = b"".join(_line(event) for event in log.since(since))
    return web.Response(body=lines, content_type=_NDJSON)


async def stream_events(request: web.Request, events: AsyncIterator[Event]) -> web.StreamResponse:
    """Send events as they come, one line each. A client that leaves ends nothing but its own stream."""
    response = web.StreamResponse(headers={"Content-Type": _NDJSON, "Cache-Control": "no-store"})
    await response.prepare(request)
    try:
        async for event in events:
            await response.write(_line(event))
        await response.write_eof()
    except ClientConnectionResetError:
        pass
    return response


def _line(event: Event) -> bytes:
    return msgspec.json.encode(event.to_wire()) + b"\n"
