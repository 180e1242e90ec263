"""The models of a daemon as the dashboard has them: where it reads each, and which one a request is about."""

from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from flexpiped.admin_models import picked
from flexpiped.dashboard.feed import Sources
from flexpiped.events import EventLog
from flexpiped.load_monitor import LoadSampler
from flexpiped.model_entry import Entry
from flexpiped.model_service import ModelService
from flexpiped.model_set import ModelSet
from flexpiped.status import StatusSource


def sources_of(
    models: ModelSet,
    *,
    status: StatusSource,
    events: EventLog,
    decisions: EventLog,
    topology: Callable[[], Mapping[str, Any]],
) -> Sources:
    """Return where the dashboard reads ``models``; of one that does not run there is nothing to see."""
    nothing, entries = LoadSampler(), models.entries

    def service(name: str) -> ModelService | None:
        return entries[name].service if name in entries else None

    return Sources(
        status=status,
        models=lambda: tuple(entries),
        tokens_per_s=lambda name: None if (of := service(name)) is None else of.status.tokens_per_s,
        load=lambda name: (nothing if (of := service(name)) is None else of.load).observe(),
        events=events,
        decisions=decisions,
        topology=topology,
    )


def first_or_picked(models: ModelSet, request: web.Request) -> Entry:
    """Return the model of ``?model=NAME``; without it the first. Raises ``ModelError``."""
    first = models.first
    return first if first is not None and "model" not in request.query else picked(models, request)
