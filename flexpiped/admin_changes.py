"""What changes a layout, or says what that would do: the same handlers on the admin socket and for the dashboard.

POST /plan              {"stages": N | "auto"}: what the planner would do, with every candidate
POST /rebalance         {"stages": N | "auto"}, {"layout": TEXT} or neither with {"engine": NAME};
                        with "replica", "dry_run" and "wait"; {"on": NUMBER} for another replica than the main one;
                        {"replicas": N} for more or fewer of them, with "stages" or "layout" of those that come
POST /rebalance/cancel  roll back the refactoring under way
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, Any, Literal, Protocol

import msgspec
from aiohttp import web

from flexpiped.admin_answers import error_answer, json_answer, stream_events
from flexpiped.config_values import Auto
from flexpiped.events import Event, EventLog
from flexpiped.handover_records import Proposal, Wanted, proposal_to_wire
from flexpiped.refactoring import Refactorings, Started, nothing_to_settle


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


class ChangeHandlers(Protocol):
    """The handlers, whoever's changes they are of."""

    async def post_plan(self, request: web.Request) -> web.Response: ...

    async def post_preview(self, request: web.Request) -> web.Response: ...

    async def post_rebalance(self, request: web.Request) -> web.StreamResponse: ...

    async def post_cancel(self, request: web.Request) -> web.Response: ...


class Changes:
    """The handlers. ``settled`` is waited for before an end is told."""

    def __init__(
        self,
        *,
        refactorings: Refactorings,
        events: EventLog,
        plans: PlanSource,
        settled: Callable[[], Awaitable[None]] = nothing_to_settle,
    ) -> None:
        self._refactorings = refactorings
        self._events = events
        self._plans = plans
        self._settled = settled

    async def post_plan(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read() or b"{}", type=PlanBody)
        return json_answer(await self._plans.plan(body.stages if isinstance(body.stages, int) else Auto.AUTO))

    async def post_preview(self, request: web.Request) -> web.Response:
        """Answer a body of ``POST /rebalance`` as a dry run, whatever it says of that."""
        body = msgspec.json.decode(await request.read(), type=RebalanceBody)
        return json_answer(_answer("dry_run", await self._refactorings.propose(body.wanted())))

    async def post_rebalance(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=RebalanceBody)
        if body.dry_run:
            return json_answer(_answer("dry_run", await self._refactorings.propose(body.wanted())))
        started = await self._refactorings.start(body.wanted())
        if isinstance(started, Proposal):
            return json_answer(_answer("unchanged", started))
        if not body.wait:
            return json_answer(_answer("started", started.proposal) | {"handover": started.number}, HTTPStatus.ACCEPTED)
        return await stream_events(request, self._progress_of(started))

    async def post_cancel(self, request: web.Request) -> web.Response:  # noqa: ARG002
        under_way = self._refactorings.under_way
        if await self._refactorings.cancel():
            return json_answer({"state": "cancelled", "message": f"rolling back: {under_way}"})
        reason = "no refactoring is under way" if under_way is None else f"past its commit point: {under_way}"
        return error_answer("nothing_to_cancel", reason, HTTPStatus.CONFLICT)

    async def _progress_of(self, started: Started) -> AsyncIterator[Event]:
        """Yield the events of one refactoring, the last of which has its record."""
        async for event in self._events.follow(since=started.since):
            if event.fields.get("handover") == started.number:
                if event.fields["state"] == "ended":
                    await self._settled()
                yield event
                if event.fields["state"] == "ended":
                    return


def _answer(state: str, proposal: Proposal) -> dict[str, Any]:
    return {"state": state, "proposal": proposal_to_wire(proposal)}
