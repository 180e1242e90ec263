"""The configuration on the admin API: what is in force, what a reload would do, and the reload."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from aiohttp import web

from flexpiped.admin_answers import error_answer, json_answer
from flexpiped.config_text import settings_to_wire
from flexpiped.reload import ReloadReport
from flexpiped.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """The daemon's configuration. ``compare`` reads the file and changes nothing; ``reload`` applies what is live."""

    settings: Callable[[], Settings]
    compare: Callable[[], ReloadReport]
    reload: Callable[[], ReloadReport]


def config_routes(configuration: Configuration) -> tuple[web.RouteDef, ...]:
    """Return the routes that show and reload ``configuration``."""

    async def get_config(_request: web.Request) -> web.Response:
        return json_answer(settings_to_wire(configuration.settings()))

    async def get_diff(_request: web.Request) -> web.Response:
        return json_answer((await asyncio.to_thread(configuration.compare)).to_wire())

    async def post_reload(_request: web.Request) -> web.Response:
        report = configuration.reload()
        if report.problems:
            message = "\n".join(("the old configuration stays in force", *report.problems))
            return error_answer("refused", message, HTTPStatus.CONFLICT)
        return json_answer(report.to_wire())

    return (
        web.get("/config", get_config),
        web.get("/config/diff", get_diff),
        web.post("/reload", post_reload),
    )
