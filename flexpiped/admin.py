"""The admin API on the Unix socket: what ``flexctl`` calls, and anybody else who may open the socket.

GET  /status            everything about the daemon
POST /rebalance         {"stages": N | "auto"}, {"layout": TEXT} or neither with {"engine": NAME};
                        with "replica", "dry_run" and "wait"; {"on": NUMBER} for another replica than the main one;
                        {"replicas": N} for more or fewer of them, with "stages" or "layout" of those that come
POST /rebalance/cancel  roll back the refactoring under way
GET  /topology          devices, links and what was measured, as they are now
POST /topology/links    keep measured figures of links
GET  /profile/target    what flexctl profile measures; POST /profile keeps it (``flexpiped.admin_profile``)
GET  /history           what was and what is intended, from the journal (``flexpiped.admin_history``)
GET  /decisions, POST /auto  what the daemon does by itself (``flexpiped.admin_auto``)
GET  /config            the settings in force; GET /config/diff what a reload would do (``flexpiped.admin_config``)
POST /reload            read the configuration file again
GET  /events            the last events, one JSON object a line; ?since=N; ?follow=1 goes on

Errors are ``{"error": {"code": ..., "message": ...}}``. What is refused moved nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec
from aiohttp import ClientConnectionResetError, web

from engines.errors import EngineError, RefactoringBusy, RefactoringRefused, UnsupportedByEngine
from flexpiped.admin_answers import error_answer, json_answer
from flexpiped.config_values import Auto
from flexpiped.events import Event, EventLog
from flexpiped.handover_records import Proposal, Wanted, proposal_to_wire
from flexpiped.hardware import Hardware
from flexpiped.refactoring import Refactorings, Started, nothing_to_settle
from flexpiped.status import StatusSource
from planner.errors import InvalidLayout, NoFeasiblePlan, PlannerError, PlanTimeout
from topology.errors import NotMeasured

_NDJSON: Final = "application/x-ndjson"
_LARGEST_BODY_BYTES: Final = 4 << 20

# The first class that fits decides.
_CODES: Final[tuple[tuple[type[Exception], str, HTTPStatus], ...]] = (
    (RefactoringBusy, "busy", HTTPStatus.CONFLICT),
    (RefactoringRefused, "refused", HTTPStatus.CONFLICT),
    (UnsupportedByEngine, "unsupported", HTTPStatus.CONFLICT),
    (NoFeasiblePlan, "infeasible", HTTPStatus.CONFLICT),
    (InvalidLayout, "invalid_layout", HTTPStatus.CONFLICT),
    (PlanTimeout, "plan_timeout", HTTPStatus.GATEWAY_TIMEOUT),
    (PlannerError, "refused", HTTPStatus.CONFLICT),
    (EngineError, "engine_unavailable", HTTPStatus.SERVICE_UNAVAILABLE),
)


class RebalanceBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /rebalance``. ``layout`` is the text of a layout file."""

    stages: int | Literal["auto"] | None = None
    layout: str | None = None
    replica: bool = False
    engine: Literal["native", "vllm", "sglang"] | None = None
    replicas: Annotated[int, msgspec.Meta(ge=1)] | None = None
    on: Annotated[int, msgspec.Meta(ge=1)] | None = None
    dry_run: bool = False
    wait: bool = False

    def __post_init__(self) -> None:
        if self.stages is not None and self.layout is not None:
            raise ValueError('"stages" and "layout" cannot be asked for together')
        if self.replicas is not None and (self.engine is not None or self.replica):
            raise ValueError('"replicas" cannot be asked for together with "engine" or "replica"')

    def wanted(self) -> Wanted:
        """Return what is asked for: nothing at all means what the planner finds best."""
        asked_nothing = {self.stages, self.layout, self.engine, self.replicas} == {None}
        stages = Auto.AUTO if self.stages == "auto" or asked_nothing else self.stages
        return Wanted(
            stages=stages,
            layout=self.layout,
            replica=self.replica,
            engine=self.engine,
            replicas=self.replicas,
            on=self.on,
        )


class PlanBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /plan``."""

    stages: Annotated[int, msgspec.Meta(ge=1)] | Literal["auto"] | None = None


class PlanSource(Protocol):
    """Plans from what is in force now."""

    async def plan(self, stages: int | Auto) -> dict[str, Any]:
        """Return a plan as JSON values. Raises ``PlannerError``, ``EngineError``."""


def admin_app(
    *,
    status: StatusSource,
    refactorings: Refactorings,
    events: EventLog,
    hardware: Hardware,
    plans: PlanSource,
    further: Sequence[web.RouteDef] = (),
    settled: Callable[[], Awaitable[None]] = nothing_to_settle,
) -> web.Application:
    """Return the application that serves the admin API. ``settled`` is waited for before an end is told."""
    admin = _Admin(
        status=status, refactorings=refactorings, events=events, hardware=hardware, plans=plans, settled=settled
    )
    app = web.Application(middlewares=[_errors_as_json], client_max_size=_LARGEST_BODY_BYTES)
    app.add_routes(
        [
            web.get("/status", admin.get_status),
            web.post("/plan", admin.post_plan),
            web.post("/rebalance", admin.post_rebalance),
            web.post("/rebalance/cancel", admin.post_cancel),
            web.get("/topology", admin.get_topology),
            web.post("/topology/links", admin.post_links),
            web.get("/events", admin.get_events),
        ]
    )
    app.add_routes(further)
    return app


class _Admin:
    def __init__(
        self,
        *,
        status: StatusSource,
        refactorings: Refactorings,
        events: EventLog,
        hardware: Hardware,
        plans: PlanSource,
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        self._settled = settled
        self._status = status
        self._plans = plans
        self._hardware = hardware
        self._refactorings = refactorings
        self._events = events

    async def get_status(self, _request: web.Request) -> web.Response:
        return json_answer(await self._status.status())

    async def post_plan(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read() or b"{}", type=PlanBody)
        return json_answer(await self._plans.plan(body.stages if isinstance(body.stages, int) else Auto.AUTO))

    async def post_rebalance(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=RebalanceBody)
        if body.dry_run:
            return json_answer(_answer("dry_run", await self._refactorings.propose(body.wanted())))
        started = await self._refactorings.start(body.wanted())
        if isinstance(started, Proposal):
            return json_answer(_answer("unchanged", started))
        if not body.wait:
            return json_answer(_answer("started", started.proposal) | {"handover": started.number}, HTTPStatus.ACCEPTED)
        return await _stream(request, self._progress_of(started))

    async def post_cancel(self, _request: web.Request) -> web.Response:
        under_way = self._refactorings.under_way
        if await self._refactorings.cancel():
            return json_answer({"state": "cancelled", "message": f"rolling back: {under_way}"})
        reason = "no refactoring is under way" if under_way is None else f"past its commit point: {under_way}"
        return error_answer("nothing_to_cancel", reason, HTTPStatus.CONFLICT)

    async def get_topology(self, _request: web.Request) -> web.Response:
        return json_answer(await asyncio.to_thread(self._hardware.look))

    async def post_links(self, request: web.Request) -> web.Response:
        file = await asyncio.to_thread(self._hardware.keep, await request.read())
        return json_answer({"state": "kept", "file": file})

    async def get_events(self, request: web.Request) -> web.StreamResponse:
        return await send_log(request, self._events)

    async def _progress_of(self, started: Started) -> AsyncIterator[Event]:
        """Yield the events of one refactoring, the last of which has its record."""
        async for event in self._events.follow(since=started.since):
            if event.fields.get("handover") == started.number:
                if event.fields["state"] == "ended":
                    await self._settled()
                yield event
                if event.fields["state"] == "ended":
                    return


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except (EngineError, PlannerError) as error:
        code, http_status = next((code, status) for kind, code, status in _CODES if isinstance(error, kind))
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
        return error_answer("bad_request", "since must be a number of an event", HTTPStatus.BAD_REQUEST)
    if request.query.get("follow") == "1":
        return await _stream(request, log.follow(since=since))
    lines = b"".join(_line(event) for event in log.since(since))
    return web.Response(body=lines, content_type=_NDJSON)


async def _stream(request: web.Request, events: AsyncIterator[Event]) -> web.StreamResponse:
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


def _answer(state: str, proposal: Proposal) -> dict[str, Any]:
    return {"state": state, "proposal": proposal_to_wire(proposal)}
