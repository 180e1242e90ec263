"""One model of a daemon as the others see it: its state, and what serves it."""

import asyncio
from dataclasses import dataclass, field
from typing import Final

from engines.errors import EngineError
from flexpiped.api.backend import Backend
from flexpiped.api.metrics import Metrics
from flexpiped.model_service import ModelService
from flexpiped.model_settings import ModelSpec
from flexpiped.models import NoDemoModel, model_source, served_name
from flexpiped.status import Health, ServiceState
from planner.errors import PlannerError

NOT_STARTED: Final = (EngineError, PlannerError, NoDemoModel)
STOPPED: Final = Health(state=ServiceState.STOPPED, reason="stopped by hand: flexctl model start")


@dataclass(slots=True, kw_only=True)
class Entry:
    """One model. ``service`` None: it does not run, and ``health_apart`` says why. ``backend``: while it serves.

    ``configured`` is what the configuration says, ``spec`` what runs; they differ after a swap by hand.
    """

    name: str
    configured: ModelSpec
    spec: ModelSpec
    metrics: Metrics
    service: ModelService | None = None
    backend: Backend | None = None
    health_apart: Health = field(default_factory=lambda: Health(state=ServiceState.STARTING, reason="starting"))
    has_given_up: bool = False
    change: str = ""  # in words, while one is under way
    task: asyncio.Task[None] | None = None

    @property
    def health(self) -> Health:
        """Its state."""
        return self.health_apart if self.service is None else self.service.health

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The LoRA adapters that requests may name; none while it does not serve."""
        capabilities = None if self.backend is None else self.backend.serving.capabilities
        return () if capabilities is None else capabilities.adapters

    @property
    def is_to_serve(self) -> bool:
        """Whether it should serve: it was not stopped by hand."""
        return self.health.state is not ServiceState.STOPPED


def name_of(spec: ModelSpec) -> str:
    """Return the name under which clients ask for a model. Raises ``NoDemoModel``."""
    return spec.table or served_name(spec.settings, model_source(spec.settings))
