"""The journal on the admin API: ``GET /history?limit=N&kind=KIND``, what ``flexctl history`` shows."""

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web

from flexpiped.admin_answers import error_answer, json_answer
from flexpiped.events import EventKind
from flexpiped.intent import intent_to_wire
from flexpiped.journal import Journal, JournalError

_LARGEST_LIMIT: Final = 10_000
_KINDS: Final = tuple(kind.value for kind in EventKind if kind is not EventKind.MISSED)


def history_routes(journal: Journal, *, tables: Callable[[], Mapping[str, str]] = dict) -> tuple[web.RouteDef, ...]:
    """Return the routes that read ``journal``. ``tables`` are those of models that are told apart, by their names."""

    async def get_history(request: web.Request) -> web.Response:
        limit, kinds = request.query.get("limit", "50"), request.query.getall("kind", [])
        if not limit.isdecimal() or not 1 <= int(limit) <= _LARGEST_LIMIT:
            return error_answer(
                "bad_request", f"limit must be a number from 1 to {_LARGEST_LIMIT}", HTTPStatus.BAD_REQUEST
            )
        if unknown := [kind for kind in kinds if kind not in _KINDS]:
            return error_answer(
                "bad_request", f"no kind {unknown[0]!r}; there are {', '.join(_KINDS)}", HTTPStatus.BAD_REQUEST
            )

        named = tables()

        def read() -> dict[str, Any]:
            return {
                "intent": _intent(journal),
                **(
                    {"intents": {name: _intent(journal.of_model(table)) for name, table in named.items()}}
                    if named
                    else {}
                ),
                "events": journal.history(limit=int(limit), kinds=kinds),
                "incomplete_since_start": journal.failure or None,
            }

        try:
            return json_answer(await asyncio.to_thread(read))
        except JournalError as error:
            return error_answer("journal_failed", str(error), HTTPStatus.SERVICE_UNAVAILABLE)

    return (web.get("/history", get_history),)


def _intent(journal: Journal) -> dict[str, Any] | None:
    stored = journal.stored()
    return None if stored is None else intent_to_wire(stored.intent)


def _bad_request(message: str) -> web.Response:
    return error_answer("bad_request", message, HTTPStatus.BAD_REQUEST)
