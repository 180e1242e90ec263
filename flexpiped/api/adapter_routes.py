"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter`` as vLLM's server has them, where the engine can do so.

They read a directory of the daemon's host, so they are there only for holders of a key with scope admin. Streams under
way with an adapter that is unloaded finish with it, as in vLLM.
"""

from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web

from engines.errors import AdapterRefused, UnsupportedByEngine
from flexpiped.adapter_set import AdapterSet
from flexpiped.api.backend import Backend
from flexpiped.api.backends import BACKENDS
from flexpiped.api.errors import ApiError, ErrorType, invalid
from flexpiped.api.fields import Body, Reader, integer, parse_object, refuse_unknown, text
from flexpiped.api.handlers import observed, read_body
from flexpiped.api.metrics import Endpoint
from flexpiped.api.outcomes import Outcome
from flexpiped.api.unsupported import NeutralValues, refuse_unsupported

LOAD_READERS: Final[Mapping[str, Reader[Any]]] = {"lora_name": text, "lora_path": text, "model": text}
LOAD_NEUTRAL: Final[NeutralValues] = {"load_inplace": (False,), "is_3d_lora_weight": (False,)}
UNLOAD_READERS: Final[Mapping[str, Reader[Any]]] = {
    "lora_name": text,
    "lora_int_id": integer(0, 2**31 - 1),  # vLLM takes and ignores it, too
    "model": text,
}
LOAD_REQUIRED: Final = ("lora_name", "lora_path")
UNLOAD_REQUIRED: Final = ("lora_name",)


async def load_lora_adapter(http: web.Request) -> web.Response:
    """POST /v1/load_lora_adapter: requests may name one more adapter as their model."""
    async with observed(http, Endpoint.ENGINE) as (backend, observation):
        body = await _body_of(http, LOAD_READERS, LOAD_NEUTRAL, LOAD_REQUIRED)
        name, path = body["lora_name"], body["lora_path"]
        try:
            await _adapters_of(backend).load(name, path)
        except (AdapterRefused, UnsupportedByEngine) as refusal:
            raise invalid(str(refusal), param="lora_name", code=_code(refusal)) from refusal
        observation.outcome = Outcome.DONE
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")


async def unload_lora_adapter(http: web.Request) -> web.Response:
    """POST /v1/unload_lora_adapter: no request may name the adapter any more."""
    async with observed(http, Endpoint.ENGINE) as (backend, observation):
        body = await _body_of(http, UNLOAD_READERS, {}, UNLOAD_REQUIRED)
        name = body["lora_name"]
        try:
            await _adapters_of(backend).unload(name)
        except UnsupportedByEngine as refusal:
            raise invalid(str(refusal), param="lora_name", code=_code(refusal)) from refusal
        except AdapterRefused as refusal:
            raise ApiError(
                status=404,
                type=ErrorType.NOT_FOUND,
                message=str(refusal),
                param="lora_name",
                code=_code(refusal),
            ) from refusal
        observation.outcome = Outcome.DONE
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")


async def _body_of(
    http: web.Request, readers: Mapping[str, Reader[Any]], neutral: NeutralValues, required: tuple[str, ...]
) -> Body:
    _ensure_keys(http)
    body = parse_object(await read_body(http))
    refuse_unknown(body, readers.keys() | neutral.keys())
    refuse_unsupported(body, neutral)
    given = {name: read(body, name) for name, read in readers.items()}
    for name in required:
        if not given[name]:
            raise invalid(f"{name} is required", param=name, code="missing_parameter")
    return given


def _ensure_keys(http: web.Request) -> None:
    """Anybody could have any directory of the host read otherwise. Scopes are checked before (``api.access``)."""
    if http.app[BACKENDS].keys() is None:
        message = f"{http.path} needs a key with scope admin, and http.api_keys has none; use flexctl lora on the host"
        raise ApiError(status=403, type=ErrorType.PERMISSION, message=message, code="insufficient_scope")


def _adapters_of(backend: Backend) -> AdapterSet:
    backend.ensure_serving()
    if backend.adapters is None:
        raise UnsupportedByEngine("this model has no adapters that change while it serves")
    return backend.adapters


def _code(refusal: Exception) -> str:
    return "unsupported_by_engine" if isinstance(refusal, UnsupportedByEngine) else "adapter_refused"
