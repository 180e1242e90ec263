"""The dashboard on the HTTP port.

GET  /                     the page; its files below /dashboard/app/. Open to all: they hold nothing of this daemon
GET  /dashboard/stream     what it shows, as server-sent events (scope read)
POST /dashboard/plan       as POST /plan of the admin API (scope admin, as the rest)
POST /dashboard/preview    a body of POST /rebalance, as a dry run
POST /dashboard/rebalance, /dashboard/rebalance/cancel  as there

Of several models each is about that of ?model=NAME, else about the first.
Keys are checked by the application's middleware (``flexpiped.api.access``), which knows these paths.
"""

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final

from aiohttp import ClientConnectionResetError, web

from engines.closing import closing
from flexpiped.admin_answers import Handler, error_answer, errors_as_json
from flexpiped.admin_changes import ChangeHandlers
from flexpiped.api.access import client_of
from flexpiped.dashboard.feed import Feed, NoStream
from flexpiped.dashboard.guard import why_no_change, why_not_ours
from flexpiped.dashboard.messages import Message, Topic, encode
from flexpiped.dashboard.pages import INDEX, SECURITY_HEADERS, load_pages
from flexpiped.keys import KeyRing, Scope
from flexpiped.settings import DashboardMode

_STREAM_HEADERS: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # or nginx in front would hold events back
}
_WRITE_DEADLINE_S: Final = 30.0  # a reader that takes nothing for so long is gone


class Dashboard:
    """The routes. ``mode`` and ``keys`` are those in force, which a reload may change."""

    def __init__(
        self,
        *,
        feed: Feed,
        changes: ChangeHandlers,
        mode: Callable[[], DashboardMode],
        keys: Callable[[], KeyRing | None],
    ) -> None:
        self._feed = feed
        self._changes = changes
        self._mode = mode
        self._keys = keys
        self._pages = load_pages()
        self._planning = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        """Return the routes for an application whose middleware asks for keys."""
        return [
            web.get("/", self.get_index),
            web.get("/dashboard/app/{name}", self.get_file),
            web.get("/dashboard/stream", self.get_stream, allow_head=False),
            web.post("/dashboard/plan", self._guarded(self._one_at_a_time(self._changes.post_plan))),
            web.post("/dashboard/preview", self._guarded(self._one_at_a_time(self._changes.post_preview))),
            web.post("/dashboard/rebalance", self._guarded(self._changing(self._changes.post_rebalance))),
            web.post("/dashboard/rebalance/cancel", self._guarded(self._changing(self._changes.post_cancel))),
        ]

    async def get_index(self, request: web.Request) -> web.Response:
        """Answer with the page."""
        self._ensure_on()
        return self._pages[INDEX].answer(request)

    async def get_file(self, request: web.Request) -> web.Response:
        """Answer with one of its files."""
        self._ensure_on()
        page = self._pages.get(request.match_info["name"])
        if page is None:
            raise web.HTTPNotFound
        return page.answer(request)

    async def get_stream(self, request: web.Request) -> web.StreamResponse:
        """Send what the feed has until it ends, the reader leaves, or keys or settings change."""
        self._ensure_on()
        ring = self._keys()
        headers = {**SECURITY_HEADERS, **_STREAM_HEADERS}
        response = web.StreamResponse(headers=headers)
        try:
            async with closing(self._feed.watch(request.query.get("model", ""))) as messages:
                async for message in messages:
                    if message.topic is Topic.HELLO:
                        await response.prepare(request)
                        await response.write(encode(self._rights(request)))
                    if self._keys() is not ring or self._mode() is DashboardMode.OFF:
                        break
                    async with asyncio.timeout(_WRITE_DEADLINE_S):
                        await response.write(encode(message))
            await response.write_eof()
        except NoStream as error:
            return error_answer("no_stream", str(error), HTTPStatus.SERVICE_UNAVAILABLE)
        except (ClientConnectionResetError, TimeoutError):
            pass
        return response

    def _rights(self, request: web.Request) -> Message:
        asks = self._keys() is not None
        is_admin = client_of(request).may(Scope.ADMIN)
        data = {
            "may_preview": is_admin,
            "why_no_change": why_no_change(self._mode(), asks_for_keys=asks, is_admin=is_admin),
            "asks_for_keys": asks,
        }
        return Message(topic=Topic.RIGHTS, data=data)

    def _guarded(self, handler: Handler) -> Handler:
        """Take only what the page itself sends."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            self._ensure_on()
            if reason := why_not_ours(request.headers, asks_for_keys=self._keys() is not None):
                return error_answer("refused", reason, HTTPStatus.FORBIDDEN)
            answer = await errors_as_json(request, handler)
            if not answer.prepared:
                answer.headers.update(SECURITY_HEADERS)
            return answer

        return guarded

    def _changing(self, handler: Handler) -> Handler:
        async def allowed(request: web.Request) -> web.StreamResponse:
            is_admin = client_of(request).may(Scope.ADMIN)
            asks = self._keys() is not None
            if reason := why_no_change(self._mode(), asks_for_keys=asks, is_admin=is_admin):
                return error_answer("refused", reason, HTTPStatus.FORBIDDEN)
            return await handler(request)

        return allowed

    def _one_at_a_time(self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Handler:
        """Plan for one page at a time: planning takes a core, which the engine may need."""

        async def alone(request: web.Request) -> web.StreamResponse:
            async with self._planning:
                return await handler(request)

        return alone

    def _ensure_on(self) -> None:
        if self._mode() is DashboardMode.OFF:
            raise web.HTTPNotFound(text='the dashboard is off: http.dashboard = "on" shows it')
