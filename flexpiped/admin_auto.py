"""The admin API of automatic control: what was decided and why, and whether anything comes of it.

GET  /decisions  the last decisions, one JSON object a line; ?since=N; ?follow=1 goes on
POST /auto       {"mode": "on" | "off" | "dry-run"}
"""

from collections.abc import Callable
from typing import Literal

import msgspec
from aiohttp import web

from flexpiped.admin_answers import send_log
from flexpiped.auto import AutoControl
from flexpiped.events import EventKind, EventLog
from flexpiped.settings import AutoMode


class AutoBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /auto``."""

    mode: Literal["on", "off", "dry-run"]


def auto_routes(control_of: Callable[[web.Request], AutoControl], *, events: EventLog) -> web.RouteTableDef:
    """Return the routes. ``control_of`` finds whose it is; a change of mode is told to ``events``."""
    routes = web.RouteTableDef()

    @routes.get("/decisions")
    async def get_decisions(request: web.Request) -> web.StreamResponse:
        return await send_log(request, control_of(request).decided)

    @routes.post("/auto")
    async def post_auto(request: web.Request) -> web.Response:
        mode = AutoMode(msgspec.json.decode(await request.read(), type=AutoBody).mode)
        control = control_of(request)
        before = control.mode
        control.set_mode(mode)
        if mode is not before:
            events.publish(EventKind.DAEMON, f"auto {mode.value}: it was {before.value}")
        return web.json_response({"mode": mode.value, "before": before.value})

    return routes
