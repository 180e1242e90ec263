"""Who may ask for what: API keys on the HTTP port. A key is never logged, and never passed on to an engine."""

from collections.abc import Callable
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from flexpiped.api.errors import ApiError, ErrorType
from flexpiped.keys import ANYBODY, Client, KeyRing, Scope

_OPEN: Final = frozenset({"/healthz", "/readyz", "/"})  # probes have no key, nor has a browser that opens a page
_PAGE_FILES: Final = "/dashboard/app/"  # the same for everybody: what the page shows comes by other paths
_CLIENT: Final = web.RequestKey("client", Client)
_BEARER: Final = "bearer "


def client_of(http: web.Request) -> Client:
    """Return whose request it is; anybody's where no key is asked for."""
    client: Client = http.get(_CLIENT, ANYBODY)
    return client


def scopes_for(path: str) -> frozenset[Scope]:
    """Return the scopes of which one opens ``path``; none for what is open to all."""
    if path in _OPEN or path.startswith(_PAGE_FILES):
        return frozenset()
    if path in ("/metrics", "/dashboard/stream"):
        return frozenset({Scope.READ})
    if path.startswith("/dashboard/"):
        return frozenset({Scope.ADMIN})
    if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):  # they read directories of the host
        return frozenset({Scope.ADMIN})
    if path in ("/openapi.json", "/version", "/v1/models") or path.startswith("/v1/models/"):
        return frozenset({Scope.INFER, Scope.READ})
    return frozenset({Scope.INFER})


def keys_asked_for(keys: Callable[[], KeyRing | None]) -> Middleware:
    """Return a middleware that lets a request through whose key, of those in force, opens its path."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        ring, wanted = keys(), scopes_for(request.path)
        if ring is not None and wanted:
            request[_CLIENT] = _let_in(request, ring, wanted)
        return await handler(request)

    return check


def _let_in(request: web.Request, ring: KeyRing, wanted: frozenset[Scope]) -> Client:
    """Return whose request it is.

    Raises:
        ApiError: 401, there is no key or it is not known; 403, it opens other things.
    """
    header = request.headers.get("Authorization", "")
    if header[: len(_BEARER)].lower() != _BEARER:
        raise _unknown("an API key is needed: Authorization: Bearer KEY", code="missing_api_key")
    client = ring.client_of(header[len(_BEARER) :].strip())
    if client is None:
        raise _unknown("the API key is not known here", code="invalid_api_key")
    if not any(client.may(scope) for scope in wanted):
        names = " or ".join(sorted(scope.value for scope in wanted))
        raise ApiError(
            status=403,
            type=ErrorType.PERMISSION,
            message=f"{request.path} needs a key with scope {names}",
            code="insufficient_scope",
        )
    return client


def _unknown(message: str, *, code: str) -> ApiError:
    return ApiError(status=401, type=ErrorType.AUTHENTICATION, message=message, code=code)
