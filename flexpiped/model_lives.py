"""How a model of a daemon starts, stops, and gives way to another, while the others serve undisturbed.

              start              +--stop, drain--> STOPPED --start--> ...
    STOPPED ---------> STARTING --> SERVING
       failed: FAILED <----+     +--swap--> 1. the new one starts beside the old one, which then drains and ends
                                            2. where there is no room for both: the old one drains and ends first

Starts come one after the other: each plans with what the others leave of the devices.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

from flexpiped.api.backend import Backend
from flexpiped.api.metrics import Metrics
from flexpiped.device_sharing import Held, together
from flexpiped.log import of_model
from flexpiped.model_entry import NOT_STARTED, STOPPED, Entry
from flexpiped.model_service import ModelService
from flexpiped.model_settings import ModelSpec
from flexpiped.status import Health, ServiceState
from planner.errors import NoFeasiblePlan

Tell = Callable[[str], None]


class MakeService(Protocol):
    """Makes what serves a model, not started yet."""

    def __call__(
        self,
        spec: ModelSpec,
        *,
        name: str,
        metrics: Metrics,
        held: Callable[[], Held],
        on_progress: Callable[[str], None],
        on_given_up: Callable[[str], None],
    ) -> ModelService: ...


class ModelLives:
    """Used on one event loop. Every method raises what a start may: ``EngineError``, ``PlannerError``, ``NoDemoModel``.

    Args:
        entries: All models; the owner adds and removes them.
        serve: Makes the backend of a model that has started, and begins what runs beside it.
        on_all_given_up: Told that no model that should serve will again, with the last reason.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        *,
        make: MakeService,
        serve: Callable[[ModelService], Backend],
        on_all_given_up: Callable[[str], None],
    ) -> None:
        self._entries = entries
        self._make = make
        self._serve = serve
        self._on_all_given_up = on_all_given_up
        self._apart: list[ModelService] = []  # those that start beside another one, or finish what they have
        self._starting = asyncio.Lock()

    @property
    def services(self) -> tuple[ModelService, ...]:
        """Those that run, and those that finish what they have."""
        running = [each.service for each in self._entries.values() if each.service is not None]
        return (*running, *self._apart)

    def held_beside(self, service: ModelService | None, *, instead_of: ModelService | None = None) -> Held:
        """Return what all others hold of the devices; ``instead_of`` counts as gone."""
        return together(each.holds() for each in self.services if each is not service and each is not instead_of)

    async def start(self, entry: Entry, spec: ModelSpec, tell: Tell) -> str:
        """Start a model that does not run; what was given up ends first. Return in words what came of it."""
        if entry.service is not None:
            await self.retire(entry, 0.0)
        service = await self.started(entry, spec, tell)
        entry.spec = spec
        self.put(entry, service)
        return "it serves"

    async def stop(self, entry: Entry, deadline_s: float | None = None) -> str:
        """Stop a model: requests that it has may finish until the deadline. Return in words what came of them."""
        entry.health_apart = STOPPED
        return "it did not run" if entry.service is None else await self.retire(entry, deadline_s)

    async def swap(self, entry: Entry, spec: ModelSpec, tell: Tell) -> str:
        """Have other files or settings take the place of those that serve. Return in words what came of it."""
        if entry.service is None or entry.has_given_up:
            return await self.start(entry, spec, tell)
        try:
            new = await self.started(entry, spec, tell, beside=True)  # 1
        except NoFeasiblePlan as full:
            tell(f"no room beside the old one: {full}")
            return await self._swap_after(entry, spec, tell)  # 2
        retiring = self._retiring(entry.service, entry.backend, None)
        entry.spec = spec
        self.put(entry, new)
        return f"the new one serves; of the old one: {await retiring}"

    async def _swap_after(self, entry: Entry, spec: ModelSpec, tell: Tell) -> str:
        """End the old one first, but not before it is known that the new one fits then."""
        before = entry.spec
        probe = self._made(entry, spec, tell, instead_of=entry.service)
        async with self._starting:
            await probe.check()
        tell("the old one ends first: its streams finish")
        entry.health_apart = Health(state=ServiceState.STARTING, reason="another one takes its place")
        said = await self.retire(entry, None)
        try:
            return f"{await self.start(entry, spec, tell)}; of the old one: {said}"
        except NOT_STARTED:
            tell("the new one did not start: the old one starts again")
            await self.start(entry, before, tell)
            raise

    async def started(self, entry: Entry, spec: ModelSpec, tell: Tell, *, beside: bool = False) -> ModelService:
        """Return a service that has started. ``beside``: another one serves the model meanwhile."""
        async with self._starting:
            service = self._made(entry, spec, tell)
            if beside:
                self._apart.append(service)
            else:
                entry.service, entry.has_given_up = service, False
            try:
                with of_model(self._told_apart(entry)):
                    await service.start()
            except BaseException as error:
                if not beside:
                    entry.service = None
                    entry.health_apart = Health(state=ServiceState.FAILED, reason=str(error) or "broken off")
                await service.close()
                raise
            finally:
                if beside:
                    self._apart.remove(service)
            return service

    def put(self, entry: Entry, service: ModelService) -> None:
        """Have a service that has started take the model's requests from now on."""
        entry.service, entry.has_given_up = service, False
        with of_model(self._told_apart(entry)):
            entry.backend = self._serve(service)

    async def retire(self, entry: Entry, deadline_s: float | None) -> str:
        """End what serves a model, which has no requests from now on. Return in words what came of those it had."""
        service, backend = entry.service, entry.backend
        assert service is not None, "it runs"
        entry.service, entry.backend, entry.has_given_up = None, None, False
        return await self._retiring(service, backend, deadline_s)

    async def _retiring(self, service: ModelService, backend: Backend | None, deadline_s: float | None) -> str:
        self._apart.append(service)
        late = 0
        try:
            service.begin_drain(
                "streams in flight are finishing", closed_because=f"model {service.name} is being stopped"
            )
            await service.end_control()
            if backend is not None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(service.drain_deadline_s if deadline_s is None else deadline_s):
                        await backend.uses.idle()
                late = backend.uses.count
        finally:  # one that is broken off by the end of the daemon leaves no engine behind
            await service.close()
            self._apart.remove(service)
        return f"{late} requests were cut off at the deadline" if late else "every request was answered"

    def _made(
        self, entry: Entry, spec: ModelSpec, tell: Tell, *, instead_of: ModelService | None = None
    ) -> ModelService:
        made: list[ModelService] = []
        with of_model(self._told_apart(entry)):
            service = self._make(
                spec,
                name=entry.name,
                metrics=entry.metrics,
                held=lambda: self.held_beside(next(iter(made), None), instead_of=instead_of),
                on_progress=tell,
                on_given_up=lambda reason: self._given_up(entry, made[0], reason),
            )
        made.append(service)
        return service

    def _given_up(self, entry: Entry, service: ModelService, reason: str) -> None:
        if entry.service is not service:
            return
        entry.has_given_up = True
        if all(not each.is_to_serve or each.has_given_up or each.service is None for each in self._entries.values()):
            self._on_all_given_up(reason)

    def _told_apart(self, entry: Entry) -> str:
        """Return the model's name, where models are told apart by names; else nothing."""
        return entry.name if any(each.configured.table for each in self._entries.values()) else ""
