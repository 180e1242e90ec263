"""The models of one daemon: which there are, how they are together, and the life of them all."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from flexpiped.api.backend import Backend
from flexpiped.events import Event, EventKind, EventLog
from flexpiped.journal import Journal
from flexpiped.model_changes import ModelChanges
from flexpiped.model_entry import NOT_STARTED, Entry
from flexpiped.model_lives import MakeService, ModelLives
from flexpiped.model_service import ModelService
from flexpiped.model_settings import ModelSpec
from flexpiped.status import Health, ServiceState
from planner.layout import Pipeline
from topology.units import plural


class ModelSet:
    """Used on one event loop.

    Args:
        specs: What is configured.
        serve: Makes the backend of a model that has started, and begins what runs beside it.
        on_progress: Told what the start of the daemon is doing.
        on_all_given_up: Told that no model that should serve will again, with the last reason.

    Raises:
        NoDemoModel
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        *,
        make: MakeService,
        serve: Callable[[ModelService], Backend],
        journal: Journal,
        events: EventLog,
        on_progress: Callable[[str], None],
        on_all_given_up: Callable[[str], None],
    ) -> None:
        self._journal = journal
        self._events = events
        self._on_progress = on_progress
        self._entries: dict[str, Entry] = {}
        self._lives = ModelLives(self._entries, make=make, serve=serve, on_all_given_up=on_all_given_up)
        self.changes = ModelChanges(self._entries, lives=self._lives, journal=journal, events=events)
        for spec in specs:
            self.changes.add(spec)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """All models by their names, in the order of the configuration."""
        return self._entries

    @property
    def are_named(self) -> bool:
        """Whether models are told apart by their names: there is one that has a table."""
        return any(each.configured.table for each in self._entries.values())

    @property
    def first(self) -> Entry | None:
        """The one that is shown where only one can be; None where a reload has taken the last."""
        return next(iter(self._entries.values()), None)

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline in force of the first, None before there is one."""
        return None if self.first is None or self.first.service is None else self.first.service.pipeline

    @property
    def max_stages(self) -> int:
        """How many stages the engine in force of the first could have on the devices that are here."""
        return 1 if self.first is None or self.first.service is None else self.first.service.max_stages

    @property
    def named_first(self) -> str:
        """The name of the first, where models are told apart by names; else nothing."""
        return self.first.name if self.are_named and self.first is not None else ""

    @property
    def in_words(self) -> str:
        """Which models there are, and of how many stages each is."""
        return ", ".join(map(_in_words, self._entries.values()))

    @property
    def health(self) -> Health:
        """Ready when every model that should serve does; else the state of the first that does not."""
        wanted = [each for each in self._entries.values() if each.is_to_serve]
        if not wanted:
            return Health(state=ServiceState.STOPPED, reason="no model is to serve")
        serving = (ServiceState.READY, ServiceState.ASLEEP)
        worst = next((each for each in wanted if each.health.state not in serving), wanted[0])
        reason = worst.health.reason
        named = f"model {worst.name}: {reason}" if reason and self.are_named else reason
        return Health(state=worst.health.state, reason=named)

    async def start_all(self, *, before_first: Callable[[], Awaitable[None]]) -> None:
        """Start those that are to serve, one after the other. One of several that does not start is told of.

        Args:
            before_first: Awaited once, when the first has started and before it counts as serving.

        Raises:
            EngineError, PlannerError, NoDemoModel: None of them has started.
        """
        failures: list[Exception] = []
        is_open = False
        for entry in tuple(self._entries.values()):
            await asyncio.to_thread(self.changes.recall, entry)
            if not entry.is_to_serve:
                continue
            try:
                service = await self._lives.started(entry, entry.spec, self._teller(entry))
            except NOT_STARTED as error:
                failures.append(error)
                self._tell_failed(entry, error)
                continue
            if not is_open:
                is_open = True
                await before_first()
            self._lives.put(entry, service)
        if failures and not is_open:
            raise failures[0]
        if not is_open:
            await before_first()
        self.changes.may_begin.set()

    def record(self, event: Event) -> None:
        """Have the journal keep what happens; progress is only for those who watch."""
        entry = self._entries.get(event.fields.get("model", "")) or self.first
        service = None if entry is None else entry.service
        intent = None if service is None else service.noted(event)
        if event.fields.get("state") != "progress":
            journal = self._journal if entry is None else self._journal.of_model(entry.configured.table)
            journal.record(event, intent)

    def begin_drain(self, reason: str) -> None:
        """Have no model take requests any more."""
        for entry in self._entries.values():
            if entry.service is not None:
                entry.service.begin_drain(reason)
            else:
                entry.health_apart = Health(state=ServiceState.DRAINING, reason=reason)

    async def idle(self) -> None:
        """Return once no model answers a request."""
        for entry in tuple(self._entries.values()):
            if entry.backend is not None:
                await entry.backend.uses.idle()

    async def end_control(self) -> None:
        """End changes that are under way, and what runs beside the models."""
        await self.changes.close()
        for service in self._lives.services:
            await service.end_control()

    async def close(self) -> None:
        """End all models."""
        for service in self._lives.services:
            await service.close()

    def _teller(self, entry: Entry) -> Callable[[str], None]:
        if not self.are_named:
            return self._on_progress
        return lambda news: self._on_progress(f"{entry.name}: {news}")

    def _tell_failed(self, entry: Entry, error: Exception) -> None:
        if self.are_named:
            message = f"{entry.name} did not start: {error}"
            self._events.publish(EventKind.MODEL, message, model=entry.name, state="failed")


def _in_words(entry: Entry) -> str:
    pipeline = None if entry.service is None else entry.service.pipeline
    stages = 0 if pipeline is None else pipeline.granularity
    return f"{entry.name} ({plural(stages, 'stage') if stages else entry.health.state.value})"
