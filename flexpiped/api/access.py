"""Who may ask for what: API keys on the HTTP port. A key is never logged, and never passed on to an engine."""

from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from flexpiped.api.backend import BACKEND
from flexpiped.api.errors import ApiError, ErrorType
from flexpiped.keys import ANYBODY, Client, Scope

_OPEN: Final = frozenset({"/healthz", "/readyz"})  # probes have no key
_CLIENT: Final = web.RequestKey("client", Client)
_BEARER: Final = "bearer "
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def client_of(http: web.Request) -> Client:
    """Return whose request it is; anybody's where no key is asked for."""
    client: Client = http.get(_CLIENT, ANYBODY)
    return client


def scopes_for(path: str) -> frozenset[Scope]:
    """Return the scopes of which one opens ``path``; none for what is open to all."""
    if path in _OPEN:
        return frozenset()
    if path == "/metrics":
        return frozenset({Scope.READ})
    if path in ("/openapi.json", "/version", "/v1/models") or path.startswith("/v1/models/"):
        return frozenset({Scope.INFER, Scope.READ})
    return frozenset({Scope.INFER})


@web.middleware
async def keys_asked_for(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let a request through whose key opens its path.

    Raises:
        ApiError: 401, there is no key or it is not known; 403, it opens other things.
    """
    ring = request.app[BACKEND].keys()
    wanted = scopes_for(request.path)
    if ring is None or not wanted:
        return await handler(request)
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
    request[_CLIENT] = client
    return await handler(request)


def _unknown(message: str, *, code: str) -> ApiError:
    return ApiError(status=401, type=ErrorType.AUTHENTICATION, message=message, code=code)
