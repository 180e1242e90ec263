"""The admin API's part in ``flexctl profile``: what is to be measured, and keeping what was.

GET  /profile/target  model, engine options and processor to measure
POST /profile         keep a profile
"""

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path

import msgspec
from aiohttp import web

from flexpiped.profiles import ProfileStore, ProfileTarget, profile_folder, profile_target
from flexpiped.settings import Settings
from planner.errors import InvalidProfile
from planner.profile_file import parse_profile


class ProfileRoutes:
    """Answers with what the daemon serves; ``target`` blocks and may raise ``EngineError``."""

    def __init__(self, *, target: Callable[[], ProfileTarget], store: ProfileStore) -> None:
        self._target = target
        self._store = store

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/profile/target", self.get_target), web.post("/profile", self.post_profile)]

    async def get_target(self, _request: web.Request) -> web.Response:
        target = await asyncio.to_thread(self._target)
        return web.Response(body=msgspec.json.encode(target), content_type="application/json")

    async def post_profile(self, request: web.Request) -> web.Response:
        text = await request.read()
        try:
            kept = await asyncio.to_thread(lambda: self._store.save(parse_profile(text)))
        except InvalidProfile as error:
            body = {"error": {"code": "not_kept", "message": str(error)}}
            return web.json_response(body, status=HTTPStatus.CONFLICT)
        return web.json_response({"state": "kept", "file": str(kept)})


def profile_routes(settings: Settings, *, source: str, environment: Mapping[str, str]) -> ProfileRoutes:
    """Return the routes for what ``settings`` serve; profiles are kept where the daemon keeps its state."""
    return ProfileRoutes(
        target=lambda: profile_target(settings, source=source),
        store=ProfileStore(folder=profile_folder(environment, home=Path.home())),
    )
