"""The models on the admin API: which there are, and the routes of one of several.

GET  /models                     each with its state, engine and files
POST /models/start, /models/stop {"model": NAME, "wait": BOOL}; stop with "deadline_s" for the streams in flight
POST /models/swap                {"model": NAME, "path": PATH, "wait": BOOL}: other files under that name

With "wait" the answer is the events of the change, one JSON object a line; the last has "result" done, failed, or
refused: it is no model, or there is no room for it.
What else is of one model (plans, changes of layout, decisions, profiles) is asked for with ?model=NAME; without it the
only model is meant.
"""

import os
from collections.abc import AsyncIterator, Callable, Mapping
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from aiohttp import web

from engines.errors import EngineDied
from flexpiped.admin_answers import json_answer, stream_events
from flexpiped.admin_profile import ProfileRoutes, profile_routes
from flexpiped.events import Event, EventLog
from flexpiped.model_changes import Begun
from flexpiped.model_entry import Entry
from flexpiped.model_service import ModelService
from flexpiped.model_set import ModelSet
from flexpiped.models import model_source


class StartBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /models/start``."""

    model: str | None = None
    wait: bool = False


class StopBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /models/stop``."""

    model: str | None = None
    deadline_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    wait: bool = False


class SwapBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /models/swap``."""

    path: Annotated[str, msgspec.Meta(min_length=1)]
    model: str | None = None
    wait: bool = False


class ModelRoutes:
    """The handlers."""

    def __init__(self, models: ModelSet, *, events: EventLog) -> None:
        self._models = models
        self._events = events

    def routes(self) -> tuple[web.RouteDef, ...]:
        """Return the routes of models, and those that pick one."""
        return (
            web.get("/models", self.get_models),
            web.post("/models/start", self.post_start),
            web.post("/models/stop", self.post_stop),
            web.post("/models/swap", self.post_swap),
            web.get("/profile/target", self.get_profile_target),
            web.post("/profile", self.post_profile),
        )

    async def get_models(self, _request: web.Request) -> web.Response:
        return json_answer({"models": [model_to_wire(each) for each in self._models.entries.values()]})

    async def post_start(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=StartBody)
        changes = self._models.changes
        return await self._answer(request, changes.start(changes.entry(body.model).name), wait=body.wait)

    async def post_stop(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=StopBody)
        changes = self._models.changes
        begun = changes.stop(changes.entry(body.model).name, deadline_s=body.deadline_s)
        return await self._answer(request, begun, wait=body.wait)

    async def post_swap(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=SwapBody)
        changes = self._models.changes
        begun = changes.swap(changes.entry(body.model).name, path=body.path)
        return await self._answer(request, begun, wait=body.wait)

    async def get_profile_target(self, request: web.Request) -> web.Response:
        return await self._profiles(request).get_target(request)

    async def post_profile(self, request: web.Request) -> web.Response:
        return await self._profiles(request).post_profile(request)

    def _profiles(self, request: web.Request) -> ProfileRoutes:
        settings = picked(self._models, request).spec.settings
        return profile_routes(settings, source=model_source(settings), environment=os.environ)

    async def _answer(self, request: web.Request, begun: Begun, *, wait: bool) -> web.StreamResponse:
        if wait:
            return await stream_events(request, self._progress_of(begun))
        return json_answer({"state": "started", "change": begun.number}, HTTPStatus.ACCEPTED)

    async def _progress_of(self, begun: Begun) -> AsyncIterator[Event]:
        async for event in self._events.follow(since=begun.since):
            if event.fields.get("change") == begun.number and "model" in event.fields:
                yield event
                if event.fields["state"] == "ended":
                    return


class PickedChanges:
    """Handlers as those of ``Changes``, of the model that a request picks.

    Args:
        pick: Finds it, or raises ``ModelError``.
    """

    def __init__(self, pick: Callable[[web.Request], Entry]) -> None:
        self._pick = pick

    async def post_plan(self, request: web.Request) -> web.Response:
        return await running(self._pick(request)).changes.post_plan(request)

    async def post_preview(self, request: web.Request) -> web.Response:
        return await running(self._pick(request)).changes.post_preview(request)

    async def post_rebalance(self, request: web.Request) -> web.StreamResponse:
        return await running(self._pick(request)).changes.post_rebalance(request)

    async def post_cancel(self, request: web.Request) -> web.Response:
        return await running(self._pick(request)).changes.post_cancel(request)


def picked(models: ModelSet, request: web.Request) -> Entry:
    """Return the model of ``?model=NAME``; without it the only one. Raises ``ModelError``."""
    return models.changes.entry(request.query.get("model"))


def running(entry: Entry) -> ModelService:
    """Return what serves a model. Raises ``EngineDied``: nothing does."""
    if entry.service is None:
        raise EngineDied(f"model {entry.name} does not run: {entry.health.reason or entry.health.state.value}")
    return entry.service


def model_to_wire(entry: Entry) -> Mapping[str, Any]:
    """Return what ``flexctl model list`` shows."""
    pipeline = None if entry.service is None else entry.service.pipeline
    return {
        "name": entry.name,
        "path": entry.spec.settings.model,
        "engine": entry.spec.settings.engine.value,
        "state": entry.health.state.value,
        "reason": entry.health.reason,
        "stages": 0 if pipeline is None else pipeline.granularity,
        "requests": 0 if entry.backend is None else entry.backend.uses.count,
        "change": entry.change or None,
        "is_as_configured": entry.spec == entry.configured and entry.is_to_serve,
    }
