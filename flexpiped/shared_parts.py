"""What all models of a daemon share, and what is made of that: what serves one of them, and what is behind the port."""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.core import Metric

from engines.parameters.keeper import ParameterKeeper
from flexpiped.admission import Admission
from flexpiped.api.backend import Backend
from flexpiped.api.backends import Backends, Served
from flexpiped.api.metrics import Metrics
from flexpiped.daemon_parts import DaemonParts
from flexpiped.device_sharing import Held
from flexpiped.events import Event, EventKind, EventLog
from flexpiped.journal import Journal
from flexpiped.keys import KeyRing
from flexpiped.kv_of_models import KvOfModels
from flexpiped.model_service import ModelService
from flexpiped.model_set import ModelSet
from flexpiped.model_settings import ModelSpec
from flexpiped.models import model_source
from flexpiped.settings import Settings
from flexpiped.status import Health
from flexpiped.survivors import Survivors
from topology.device import Device
from topology.measured import state_file


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedParts:
    """Used on one event loop. What is a function here is asked anew each time.

    ``decisions`` are those of all models. ``numbers`` and ``planning`` are as ``Refactorings`` has them. ``may_stay``:
    whether engines that outlive the daemon are to stay now. ``devices`` looks at them, and blocks.
    """

    models: Callable[[], ModelSet]
    settings: Callable[[], Settings]
    keys: Callable[[], KeyRing | None]
    api_url: Callable[[], str]
    devices: Callable[[], Sequence[Device]]
    may_stay: Callable[[], bool]
    admin_socket: Path
    admission: Admission
    parameters: ParameterKeeper
    journal: Journal
    events: EventLog
    decisions: EventLog
    numbers: Iterator[int]
    planning: asyncio.Lock
    is_traced: bool
    kv_of_models: KvOfModels = field(default_factory=KvOfModels)

    def model_service(
        self,
        spec: ModelSpec,
        *,
        name: str,
        metrics: Metrics,
        held: Callable[[], Held],
        on_progress: Callable[[str], None],
        on_given_up: Callable[[str], None],
    ) -> ModelService:
        """A ``MakeService``."""
        return ModelService(
            spec.settings,
            name=name,
            source=model_source(spec.settings),
            parts=DaemonParts(
                api_url=self.api_url(),
                events=self.events.of_model(lambda: name if self.models().are_named else ""),
                journal=self.journal.of_model(spec.table),
                metrics=metrics,
                is_traced=self.is_traced,
                parameters=self.parameters,
                survivors=self._survivors_of(name, spec.settings),
                numbers=self.numbers,
                planning=self.planning,
                held=held,
                kv_of_models=self.kv_of_models,
                is_name_taken=lambda wanted: self._is_taken(wanted, but=name),
                on_decision=lambda decision: self._note_decision(name, decision),
                on_progress=on_progress,
                on_given_up=on_given_up,
            ),
        )

    def serve(self, model: ModelService) -> Backend:
        """Begin what runs beside a model that has started, and return its backend."""
        model.begin(devices=self.devices)
        return Backend(
            model=model.name,
            serving=model.serving,
            text=model.text,
            admission=self.admission,
            adapters=model.adapters,
            keys=self.keys,
            sampling_defaults=model.sampling_defaults,
            tool_calls=model.tool_calls,
            body_deadline_s=self.settings().http.body_deadline_s,
            metrics=model.metrics,
            health=lambda: model.health,
            devices=self.devices,
        )

    def backends(self, *, health: Callable[[], Health], processes: Callable[[], Iterable[Metric]]) -> Backends:
        """Return all models, as the port has them."""
        return Backends(
            models=lambda: {
                name: Served(health=each.health, backend=each.backend, metrics=each.metrics)
                for name, each in self.models().entries.items()
            },
            are_named=lambda: self.models().are_named,
            health=health,
            admission=self.admission,
            keys=self.keys,
            devices=self.devices,
            parameters=lambda: self.parameters.figures,
            processes=processes,
            body_deadline_s=lambda: self.settings().http.body_deadline_s,
        )

    def _note_decision(self, name: str, decision: Event) -> None:
        named = {"model": name} if self.models().are_named else {}
        self.decisions.publish(decision.kind, decision.message, **decision.fields, **named)

    def _survivors_of(self, name: str, settings: Settings) -> Survivors:
        return Survivors(
            settings,
            name=name,
            served=lambda: frozenset(self.models().entries),
            may_stay=self.may_stay,
            admin_socket=self.admin_socket,
            state_folder=state_file(os.environ, home=Path.home()).parent,
            environment=os.environ,
            on_news=lambda news: self.events.publish(EventKind.ENGINE, news),
            parameters=self.parameters.address,
        )

    def _is_taken(self, wanted: str, *, but: str) -> bool:
        """Whether requests that give a name mean a model, or an adapter of one that is not ``but``."""
        entries = self.models().entries
        others = (each for each in entries.values() if each.name != but)
        return wanted in entries or any(wanted in each.adapter_names for each in others)
