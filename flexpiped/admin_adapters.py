"""LoRA adapters on the admin API, what ``flexctl lora`` calls. Of one of several models with ?model=NAME.

GET  /adapters                  each with its directory, and how many requests are under way with it
POST /adapters/load             {"name": NAME, "path": PATH}: answered once requests may name it
POST /adapters/unload           {"name": NAME}: no request may name it any more; "requests" go on with it
"""

from collections.abc import Callable
from typing import Annotated

import msgspec
from aiohttp import web

from flexpiped.adapter_set import AdapterSet
from flexpiped.admin_answers import json_answer

_Text = Annotated[str, msgspec.Meta(min_length=1)]


class LoadBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /adapters/load``."""

    name: _Text
    path: _Text


class UnloadBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /adapters/unload``."""

    name: _Text


def adapter_routes(pick: Callable[[web.Request], AdapterSet]) -> tuple[web.RouteDef, ...]:
    """Return the routes. ``pick`` finds whose adapters a request is about, or raises ``ModelError``, ``EngineDied``."""

    async def get_adapters(request: web.Request) -> web.Response:
        return json_answer({"adapters": [msgspec.to_builtins(each) for each in pick(request).all()]})

    async def post_load(request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read(), type=LoadBody)
        await pick(request).load(body.name, body.path)
        return json_answer({"state": "loaded", "name": body.name})

    async def post_unload(request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read(), type=UnloadBody)
        requests = await pick(request).unload(body.name)
        return json_answer({"state": "leaving" if requests else "unloaded", "name": body.name, "requests": requests})

    return (
        web.get("/adapters", get_adapters),
        web.post("/adapters/load", post_load),
        web.post("/adapters/unload", post_unload),
    )
