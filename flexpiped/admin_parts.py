"""The admin API of a daemon, put together: what is asked of one of several models, and what of all of them."""

from aiohttp import web

from flexpiped.admin import admin_app
from flexpiped.admin_adapters import adapter_routes
from flexpiped.admin_auto import auto_routes
from flexpiped.admin_config import Configuration, config_routes
from flexpiped.admin_history import history_routes
from flexpiped.admin_models import ModelRoutes, PickedChanges, picked, running
from flexpiped.events import EventLog
from flexpiped.hardware import Hardware
from flexpiped.journal import Journal
from flexpiped.model_set import ModelSet
from flexpiped.models_status import ModelsStatus


def admin_of(
    models: ModelSet,
    *,
    status: ModelsStatus,
    hardware: Hardware,
    events: EventLog,
    journal: Journal,
    configuration: Configuration,
) -> web.Application:
    """Return the application for the Unix socket."""

    def tables() -> dict[str, str]:
        """Return the tables of models that are told apart, by their names."""
        entries = models.entries if models.are_named else {}
        return {name: each.configured.table for name, each in entries.items()}

    return admin_app(
        status=status,
        changes=PickedChanges(lambda request: picked(models, request)),
        events=events,
        hardware=hardware,
        further=(
            *ModelRoutes(models, events=events).routes(),
            *history_routes(journal, tables=tables),
            *auto_routes(lambda request: running(picked(models, request)).auto, events=events),
            *adapter_routes(lambda request: running(picked(models, request)).adapters),
            *config_routes(configuration),
        ),
    )
