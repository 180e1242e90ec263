"""The HTTP application of an ingress process: what generates is answered here, all else by the daemon.

A request is taken here if it is for a model, or an adapter of one, that this process knows to serve. All others go to
the daemon, which knows better: of models that have come or gone this moment, that do not serve, or that nobody has.
"""

from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from flexpiped.api.access import keys_asked_for
from flexpiped.api.app import errors_in_one_shape
from flexpiped.api.backends import BACKENDS, Backends, Served
from flexpiped.api.errors import ApiError
from flexpiped.api.fields import parse_object
from flexpiped.api.forwarding import OWN_PATHS
from flexpiped.api.handlers import chat_completions, completions, engine_route, errors_translated, read_body
from flexpiped.api.metrics import Endpoint


def ingress_app(backends: Backends, *, relay: Handler, max_body_bytes: int) -> web.Application:
    """Return the application. It must be run with ``handler_cancellation``, as the daemon's."""
    app = web.Application(
        middlewares=[errors_in_one_shape, keys_asked_for(backends.keys)], client_max_size=max_body_bytes
    )
    app[BACKENDS] = backends
    engine = _here_or_relayed(engine_route, Endpoint.ENGINE, relay)
    app.add_routes(
        [
            web.post("/v1/completions", _here_or_relayed(completions, Endpoint.COMPLETIONS, relay)),
            web.post("/v1/chat/completions", _here_or_relayed(chat_completions, Endpoint.CHAT, relay)),
            *(web.post(path, engine) for path in OWN_PATHS),
            web.route("*", "/{path:.*}", relay),
        ]
    )
    return app


def _here_or_relayed(handler: Handler, endpoint: Endpoint, relay: Handler) -> Handler:
    async def answer(http: web.Request) -> web.StreamResponse:
        backends = http.app[BACKENDS]
        try:
            body = await read_body(http)  # aiohttp keeps it for whoever reads it next
        except BaseException:
            with backends.unnamed.observe(endpoint) as nobodys, errors_translated(nobodys):
                raise
        return await (handler(http) if is_taken_here(backends, body) else relay(http))

    return answer


def is_taken_here(backends: Backends, body: bytes) -> bool:
    """Whether the request is for a model that serves here. What is no JSON is refused here as well as there."""
    models = backends.models()
    if not models:
        return False
    try:
        name: Any = parse_object(body).get("model")
    except ApiError:
        return not backends.are_named()
    if name is None:
        return len(models) == 1 and not backends.are_named()
    return isinstance(name, str) and any(_is_of(name, model, served) for model, served in models.items())


def _is_of(name: str, model: str, served: Served) -> bool:
    return name == model or name in served.adapters
