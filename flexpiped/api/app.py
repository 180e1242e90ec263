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
from engines.protocol import EngineCounters, StageStatus
from flexpiped.api.access import keys_asked_for
from flexpiped.api.backend import BACKEND, Backend
from flexpiped.api.errors import ApiError, from_http_status
from flexpiped.api.forwarding import OWN_PATHS
from flexpiped.api.handlers import chat_completions, completions, engine_route
from flexpiped.api.metrics import Levels
from flexpiped.api.openapi import describe
from flexpiped.api.parameters import ensure_model
from flexpiped.api.text_routes import detokenize, tokenize
from flexpiped.status import ServiceState
from flexpiped.total_counters import total_counters

_COUNTERS_TIMEOUT_S = 1.0
_MAX_BODY_BYTES = 16 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app(
    backend: Backend,
    *,
    max_body_bytes: int = _MAX_BODY_BYTES,
    further: Sequence[web.RouteDef] = (),
    outermost: Sequence[Middleware] = (),
) -> web.Application:
    """Return the application. It must be run with ``handler_cancellation``: a client that leaves frees its request."""
    middlewares = [*outermost, errors_in_one_shape, keys_asked_for(backend.keys)]
    app = web.Application(middlewares=middlewares, client_max_size=max_body_bytes)
    app[BACKEND] = backend
    app.add_routes(
        [
            web.post("/v1/completions", completions),
            web.post("/v1/chat/completions", chat_completions),
            *(web.post(path, engine_route) for path in OWN_PATHS),
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


def _model_card(backend: Backend) -> dict[str, object]:
    capabilities = backend.serving.capabilities
    return {
        "id": backend.model,
        "object": "model",
        "created": backend.created_unix_s,
        "owned_by": "flexpiped",
        "max_model_len": None if capabilities is None else capabilities.max_model_len,
    }


async def models(http: web.Request) -> web.Response:
    """GET /v1/models"""
    return _json({"object": "list", "data": [_model_card(http.app[BACKEND])]})


async def model(http: web.Request) -> web.Response:
    """GET /v1/models/{model}"""
    backend = http.app[BACKEND]
    ensure_model(http.match_info["model"], served=backend.model)
    return _json(_model_card(backend))


async def version(http: web.Request) -> web.Response:
    """GET /version"""
    capabilities = http.app[BACKEND].serving.capabilities
    engine = None if capabilities is None else capabilities.name
    return _json({"version": flexpiped.__version__, "engine": engine})


async def openapi(http: web.Request) -> web.Response:
    """GET /openapi.json: with what the engine of now takes."""
    backend = http.app[BACKEND]
    return _json(
        describe(
            model=backend.model,
            capabilities=backend.serving.capabilities,
            version=flexpiped.__version__,
            asks_for_keys=backend.keys() is not None,
        )
    )


async def healthz(_http: web.Request) -> web.Response:
    """GET /healthz: the process answers."""
    return _json({"status": "alive"})


async def readyz(http: web.Request) -> web.Response:
    """GET /readyz: 200 while requests are served, at once or after waking up; else 503 with the reason."""
    backend = http.app[BACKEND]
    health = backend.health()
    reason = health.reason if backend.text.failure is None else backend.text.failure
    ready = health.state in (ServiceState.READY, ServiceState.ASLEEP) and backend.text.failure is None
    state = health.state if backend.text.failure is None else ServiceState.FAILED
    return _json({"status": state.value, "reason": reason}, status=200 if ready else 503)


async def metrics(http: web.Request) -> web.Response:
    """GET /metrics"""
    backend = http.app[BACKEND]
    levels = Levels(
        state=backend.health().state,
        requests_queued=backend.admission.requests_queued,
        tokens_in_flight=backend.admission.tokens_in_flight,
    )
    counters, stages = await _engine_readings(backend)
    devices = await asyncio.to_thread(backend.devices)  # asks the driver
    body = backend.metrics.render(counters, levels, stages=stages, devices=devices)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _engine_readings(backend: Backend) -> tuple[EngineCounters | None, Sequence[StageStatus]]:
    """Return the counters of all engines together, and the stages of the main one: stages are known by their index."""
    engines = backend.serving.engines
    with suppress(EngineError, TimeoutError):
        async with asyncio.timeout(_COUNTERS_TIMEOUT_S):
            return await total_counters(engines), await engines[0].stages() if engines else ()
    return None, ()
