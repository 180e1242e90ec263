"""What the HTTP port answers before the engine is ready: alive, not serving yet, and why."""

from collections.abc import Callable

from aiohttp import web

from flexpiped.status import Health


def starting_app(health: Callable[[], Health]) -> web.Application:
    """Return an application that knows ``/healthz`` and answers everything else 503 with the reason."""

    async def alive(_request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def not_yet(_request: web.Request) -> web.Response:
        now = health()
        message = f"{now.state.value}: {now.reason}" if now.reason else now.state.value
        error = {"message": message, "type": "service_unavailable", "param": None, "code": now.state.value}
        return web.json_response({"error": error}, status=503, headers={"Retry-After": "1"})

    app = web.Application()
    app.add_routes([web.get("/healthz", alive), web.route("*", "/{path:.*}", not_yet)])
    return app
