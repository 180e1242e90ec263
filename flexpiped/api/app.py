"""The application: routes, probes, and errors in one shape."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CONTENT_TYPE_LATEST

import flexpiped
from engines.errors import EngineError
from engines.protocol import EngineCapabilities, EngineCounters, StageStatus
from flexpiped.api.access import keys_asked_for
from flexpiped.api.adapter_routes import load_lora_adapter, unload_lora_adapter
from flexpiped.api.backend import Backend
from flexpiped.api.backends import BACKENDS, Backends, Served, no_such_model, only
from flexpiped.api.errors import ApiError, from_http_status
from flexpiped.api.exposition import exposition, labelled
from flexpiped.api.forwarding import OWN_PATHS
from flexpiped.api.handlers import chat_completions, completions, engine_route
from flexpiped.api.metrics import Levels, daemon_families, model_states
from flexpiped.api.openapi import describe
from flexpiped.api.text_routes import detokenize, tokenize
from flexpiped.status import ServiceState
from flexpiped.total_counters import total_counters

_COUNTERS_TIMEOUT_S = 1.0
_MAX_BODY_BYTES = 16 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app(
    backends: Backends | Backend,
    *,
    max_body_bytes: int = _MAX_BODY_BYTES,
    further: Sequence[web.RouteDef] = (),
    outermost: Sequence[Middleware] = (),
) -> web.Application:
    """Return the application. It must be run with ``handler_cancellation``: a client that leaves frees its request."""
    backends = only(backends) if isinstance(backends, Backend) else backends
    middlewares = [*outermost, errors_in_one_shape, keys_asked_for(backends.keys)]
    app = web.Application(middlewares=middlewares, client_max_size=max_body_bytes)
    app[BACKENDS] = backends
    app.add_routes(
        [
            web.post("/v1/completions", completions),
            web.post("/v1/chat/completions", chat_completions),
            *(web.post(path, engine_route) for path in OWN_PATHS),
            web.post("/v1/load_lora_adapter", load_lora_adapter),
            web.post("/v1/unload_lora_adapter", unload_lora_adapter),
            web.post("/tokenize", tokenize),
            web.post("/detokenize", detokenize),
            web.get("/version", version),
            web.get("/openapi.json", openapi),
            web.get("/v1/models", models),
            web.get("/v1/models/{model:.+}", model),
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/metrics", metrics),
        ]
    )
    app.add_routes(further)
    return app


@web.middleware
async def errors_in_one_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error, the framework's too, in OpenAI's shape."""
    try:
        return await handler(request)
    except ApiError as error:
        return _error_response(error, headers=error.headers)
    except web.HTTPException as refused:
        message = f"{request.method} {request.path}: {refused.text or refused.reason}"
        headers = {"Allow": refused.headers["Allow"]} if "Allow" in refused.headers else {}
        return _error_response(from_http_status(refused.status, message=message), headers=headers)


def _error_response(error: ApiError, *, headers: dict[str, str]) -> web.Response:
    return web.Response(status=error.status, body=error.encode(), content_type="application/json", headers=headers)


def _json(value: object, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


def _cards(backends: Backends) -> dict[str, dict[str, object]]:
    """Return what is told of each model and of its adapters, by name."""
    cards: dict[str, dict[str, object]] = {}
    for model, served in backends.models().items():
        cards[model] = _model_card(model, served, backends.created_unix_s)
        cards |= {name: cards[model] | {"id": name, "parent": model} for name in served.adapters}
    return cards


def _model_card(name: str, served: Served, created_unix_s: int) -> dict[str, object]:
    backend = served.backend
    capabilities = None if backend is None else backend.serving.capabilities
    return {
        "id": name,
        "object": "model",
        "created": created_unix_s if backend is None else backend.created_unix_s,
        "owned_by": "flexpiped",
        "max_model_len": None if capabilities is None else capabilities.max_model_len,
    }


async def models(http: web.Request) -> web.Response:
    """GET /v1/models"""
    return _json({"object": "list", "data": list(_cards(http.app[BACKENDS]).values())})


async def model(http: web.Request) -> web.Response:
    """GET /v1/models/{model}"""
    name, known = http.match_info["model"], _cards(http.app[BACKENDS])
    if name not in known:
        raise no_such_model(name, known)
    return _json(known[name])


async def version(http: web.Request) -> web.Response:
    """GET /version: with the engine of the only model, or the engines of all."""
    names = {each.name for each in _capabilities(http.app[BACKENDS])}
    return _json({"version": flexpiped.__version__, "engine": ", ".join(sorted(names)) or None})


def _capabilities(backends: Backends) -> list[EngineCapabilities]:
    serving = [each.backend.serving for each in backends.models().values() if each.backend is not None]
    return [each.capabilities for each in serving if each.capabilities is not None]


async def openapi(http: web.Request) -> web.Response:
    """GET /openapi.json: with what the engine of now takes, of several models that of the first."""
    backends = http.app[BACKENDS]
    first = next((each.backend for each in backends.models().values() if each.backend is not None), None)
    return _json(
        describe(
            model=next(iter(backends.models()), ""),
            capabilities=next(iter(_capabilities(backends)), None),
            version=flexpiped.__version__,
            asks_for_keys=backends.keys() is not None,
            calls_tools=first is not None and first.tool_calls is not None,
        )
    )


async def healthz(_http: web.Request) -> web.Response:
    """GET /healthz: the process answers."""
    return _json({"status": "alive"})


async def readyz(http: web.Request) -> web.Response:
    """GET /readyz: 200 while every model that should serve does, at once or after waking up; else 503 and why."""
    backends = http.app[BACKENDS]
    health = backends.health()
    texts = [each.backend.text.failure for each in backends.models().values() if each.backend is not None]
    failure = next((each for each in texts if each is not None), None)
    ready = health.state in (ServiceState.READY, ServiceState.ASLEEP) and failure is None
    state, reason = (health.state, health.reason) if failure is None else (ServiceState.FAILED, failure)
    return _json({"status": state.value, "reason": reason}, status=200 if ready else 503)


async def metrics(http: web.Request) -> web.Response:
    """GET /metrics"""
    backends = http.app[BACKENDS]
    levels = Levels(
        state=backends.health().state,
        requests_queued=backends.admission.requests_queued,
        tokens_in_flight=backends.admission.tokens_in_flight,
    )
    parts = []
    for name, served in backends.models().items():
        counters, stages = await _engine_readings(served.backend)
        families = served.metrics.families(counters, stages=stages)
        parts.append(labelled(families, name if backends.are_named() else ""))
    if backends.are_named():
        states = {name: served.health.state for name, served in backends.models().items()}
        parts += [backends.unnamed.families(None), model_states(states)]
    devices = await asyncio.to_thread(backends.devices)  # asks the driver
    parameters, processes = backends.parameters(), backends.processes()
    of_daemon = daemon_families(levels, devices=devices, parameters=parameters, processes=processes)
    body = exposition(*parts, of_daemon)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _engine_readings(backend: Backend | None) -> tuple[EngineCounters | None, Sequence[StageStatus]]:
    """Return the counters of all engines together, and the stages of the main one: stages are known by their index."""
    if backend is None:
        return None, ()
    engines = backend.serving.engines
    with suppress(EngineError, TimeoutError):
        async with asyncio.timeout(_COUNTERS_TIMEOUT_S):
            return await total_counters(engines), await engines[0].stages() if engines else ()
    return None, ()
