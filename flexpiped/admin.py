"""The admin API on the Unix socket: what ``flexctl`` calls, and anybody else who may open the socket.

GET  /status            everything about the daemon
POST /plan, /rebalance, /rebalance/cancel  what changes the layout (``flexpiped.admin_changes``)
GET  /topology          devices, links and what was measured, as they are now
POST /topology/links    keep measured figures of links
GET  /models, POST /models/start, /models/stop, /models/swap  (``flexpiped.admin_models``)
GET  /profile/target    what flexctl profile measures; POST /profile keeps it (``flexpiped.admin_profile``)
GET  /history           what was and what is intended, from the journal (``flexpiped.admin_history``)
GET  /decisions, POST /auto  what the daemon does by itself (``flexpiped.admin_auto``)
GET  /config            the settings in force; GET /config/diff what a reload would do (``flexpiped.admin_config``)
POST /reload            read the configuration file again
GET  /events            the last events, one JSON object a line; ?since=N; ?follow=1 goes on

Errors are ``{"error": {"code": ..., "message": ...}}``. What is refused moved nothing.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from aiohttp import web

from flexpiped.admin_answers import errors_as_json, json_answer, send_log
from flexpiped.admin_changes import ChangeHandlers
from flexpiped.events import EventLog
from flexpiped.hardware import Hardware
from flexpiped.status import StatusSource

_LARGEST_BODY_BYTES: Final = 4 << 20


def admin_app(
    *,
    status: StatusSource,
    changes: ChangeHandlers,
    events: EventLog,
    hardware: Hardware,
    further: Sequence[web.RouteDef] = (),
) -> web.Application:
    """Return the application that serves the admin API."""
    admin = _Admin(status=status, events=events, hardware=hardware)
    app = web.Application(middlewares=[errors_as_json], client_max_size=_LARGEST_BODY_BYTES)
    app.add_routes(
        [
            web.get("/status", admin.get_status),
            web.post("/plan", changes.post_plan),
            web.post("/rebalance", changes.post_rebalance),
            web.post("/rebalance/cancel", changes.post_cancel),
            web.get("/topology", admin.get_topology),
            web.post("/topology/links", admin.post_links),
            web.get("/events", admin.get_events),
        ]
    )
    app.add_routes(further)
    return app


class _Admin:
    def __init__(self, *, status: StatusSource, events: EventLog, hardware: Hardware) -> None:
        self._status = status
        self._hardware = hardware
        self._events = events

    async def get_status(self, _request: web.Request) -> web.Response:
        return json_answer(await self._status.status())

    async def get_topology(self, _request: web.Request) -> web.Response:
        return json_answer(await asyncio.to_thread(self._hardware.look))

    async def post_links(self, request: web.Request) -> web.Response:
        file = await asyncio.to_thread(self._hardware.keep, await request.read())
        return json_answer({"state": "kept", "file": file})

    async def get_events(self, request: web.Request) -> web.StreamResponse:
        return await send_log(request, self._events)
