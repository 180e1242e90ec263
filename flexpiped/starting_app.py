"""What the HTTP port answers before the engine is ready: alive, not serving yet, and why. The dashboard is there."""

from collections.abc import Callable, Sequence
from typing import NoReturn

from aiohttp import web

from flexpiped.api.access import keys_asked_for
from flexpiped.api.app import errors_in_one_shape
from flexpiped.api.errors import unavailable
from flexpiped.keys import KeyRing
from flexpiped.status import Health


def starting_app(
    health: Callable[[], Health],
    *,
    keys: Callable[[], KeyRing | None] = lambda: None,
    further: Sequence[web.RouteDef] = (),
) -> web.Application:
    """Return an application that knows ``/healthz`` and ``further``, and answers everything else 503 with the reason.

    Only who has a key is told the reason, where keys are asked for, but by ``/readyz``.
    """

    async def alive(_request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def not_yet(_request: web.Request) -> NoReturn:
        now = health()
        message = f"{now.state.value}: {now.reason}" if now.reason else now.state.value
        raise unavailable(message, code=now.state.value, retry_after_s=1)

    app = web.Application(middlewares=[errors_in_one_shape, keys_asked_for(keys)])
    app.add_routes([web.get("/healthz", alive), *further, web.route("*", "/{path:.*}", not_yet)])
    return app
