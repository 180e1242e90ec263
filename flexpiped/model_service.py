"""Everything that serves one model: engine, replicas, text process, changes of layout, load, automatic control.

A daemon has one of these for each model that it serves; what it is given of the daemon's is in
``flexpiped.daemon_parts``.

    start: files -> engine and text process -> begin: control loops, further replicas -> end_control -> close
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from engines.text.client import TextService
from flexpiped.adapter_set import AdapterSet
from flexpiped.admin_changes import Changes
from flexpiped.api.tool_syntax import ToolCalls, tool_calls_of
from flexpiped.config_values import Auto
from flexpiped.daemon_parts import DaemonParts
from flexpiped.device_sharing import Held
from flexpiped.engine_factory import find_files
from flexpiped.engine_in_force import EngineInForce
from flexpiped.engine_start import EngineStart
from flexpiped.events import Event, EventKind
from flexpiped.intent import Intent, IntentKeeper, basis_of
from flexpiped.model_control import control_of, neighbourhood_of
from flexpiped.model_news import ModelNews
from flexpiped.model_start import check_start, sampling_defaults_of, start_both
from flexpiped.model_state import ModelState
from flexpiped.plan_wire import answer_to_wire, starts_to_wire
from flexpiped.refactoring import Refactorings, Started
from flexpiped.replica import Replica
from flexpiped.replicas import Replicas
from flexpiped.settings import Settings
from flexpiped.status import DaemonStatus, Health, Identity
from flexpiped.supervision import SHUTTING_DOWN
from flexpiped.tracing import TracedLoad
from flexpiped.watches import watch_text
from planner.layout import Pipeline
from topology.device import Device


class ModelService:
    """Serves one model from ``start`` to ``close``. Used on one event loop.

    Args:
        name: Under which clients ask for it.
        source: Directory or hub id.
        parts: What the daemon gives it.
    """

    def __init__(self, settings: Settings, *, name: str, source: str, parts: DaemonParts) -> None:
        events, journal = parts.events, parts.journal
        self._settings = settings
        self._parts = parts
        self._events = events
        self.name = name
        self.source = source
        self._state = ModelState()
        self._news = ModelNews(parts, self._state, replicas=self._replicas)
        self.sampling_defaults: Mapping[str, Any] = {}
        self._further: tuple[Pipeline, ...] = ()  # replicas that are to come back beside the first
        self._text: TextService | None = None
        self._engines, self._control = AsyncExitStack(), AsyncExitStack()
        self._in_force = EngineInForce(
            settings=lambda: self._settings,
            reason=lambda: self.health.reason,
            against_change=lambda: self._state.against_change(has_engine=self._has_engine),
        )
        self.refactorings = Refactorings(
            engine=self._in_force.engine_to_change,
            resolver=lambda: self._in_force.offer().resolver,
            events=events,
            replica=self._in_force.replica,
            fleet=self._in_force.fleet,
            other_engine=self._in_force.other,
            settled=journal.settled,
            numbers=parts.numbers,
            planning=parts.planning,
        )
        self.changes = Changes(refactorings=self.refactorings, events=events, plans=self, settled=journal.settled)
        self.adapters = AdapterSet(
            replicas=self._in_force.known_replicas,
            is_taken=parts.is_name_taken,
            tell=self._news.engine,
        )
        self._intents = IntentKeeper(basis=basis_of(settings), in_force=self._in_force.intended, intent=None)
        self._controls = control_of(
            settings, in_force=self._in_force, refactorings=self.refactorings, on_decision=self._news.decided
        )
        self.load, self.auto = self._controls.load, self._controls.auto
        self.metrics = parts.metrics
        self.metrics.listener = TracedLoad(self.load) if parts.is_traced else self.load
        self.status = DaemonStatus(
            identity=Identity(model_name=name, model_path=source, api_url=parts.api_url),
            engine_name=lambda: self._in_force.name,
            health=lambda: self.health,
            engine=self._in_force.engine,
            refactorings=self.refactorings,
            latencies=self.metrics.latencies,
            fleet=lambda: () if self._in_force.replicas is None else self._in_force.replicas.status(),
            auto=lambda: {"mode": self.auto.mode.value, "decision": self.auto.last},
            parameters=lambda: parts.parameters.figures,
            arrivals=lambda: self.load.observe().windows,
        )

    # --- what it is ---

    @property
    def health(self) -> Health:
        """Its state."""
        replicas = self._in_force.replicas
        return self._state.health(
            None if replicas is None or not self._state.is_serving else replicas.supervision,
            text_failure=None if self._text is None else self._text.failure,
        )

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline in force, None before there is one."""
        return self._in_force.pipeline

    @property
    def max_stages(self) -> int:
        """How many stages the engine in force could have on the devices that are here."""
        return self._in_force.offer().resolver.max_stages

    @property
    def serving(self) -> Replicas:
        """What serves its requests, once it has started."""
        return self._in_force.known_replicas()

    @property
    def text(self) -> TextService:
        """Its text process, once it has started."""
        assert self._text is not None, "start comes first"
        return self._text

    @property
    def tool_format(self) -> str:
        """What is configured of how its model calls tools."""
        return self._settings.tool_format.value

    @property
    def tool_calls(self) -> ToolCalls | None:
        """How its model calls tools, once it has started; None: that is not known."""
        about = self.text.about
        return tool_calls_of(self.tool_format, chat_template=about.chat_template, added_tokens=about.added_tokens)

    @property
    def drain_deadline_s(self) -> float:
        """So long its requests may go on when it stops."""
        return self._settings.handover.drain_deadline_s

    @property
    def _has_engine(self) -> bool:
        replicas = self._in_force.replicas
        return replicas is not None and replicas.engine is not None

    def holds(self) -> Held:
        """Return what it holds of each device, and what a change under way is about to take."""
        replicas = () if self._in_force.replicas is None else self._in_force.replicas.pipelines
        pipelines = (*replicas, *self.refactorings.coming, *self._in_force.coming)
        if not pipelines:
            return {}
        return self._in_force.offer().resolver.held_by(pipelines, adapter_bytes=self.adapters.device_bytes)

    async def plan(self, stages: int | Auto) -> dict[str, Any]:
        """Return what the planner would do now, with every candidate; moves nothing.

        Raises:
            PlannerError, EngineError
        """
        engine, offer = self._in_force.engine(), self._in_force.offer()
        resolver = offer.resolver
        began_s = time.monotonic()
        answer = await asyncio.to_thread(
            resolver.answer, stages, current=engine.pipeline, resident=engine.capabilities.resident
        )
        took_s = time.monotonic() - began_s
        starts = await asyncio.to_thread(starts_to_wire, offer.starts, answer)
        return answer_to_wire(answer, took_s=took_s, starts=starts)

    # --- its life ---

    def use(self, settings: Settings) -> None:
        """Use what ``settings`` say of what is live. What is started later is started with them."""
        self._settings = settings
        self._controls.use(settings)
        self._in_force.use(settings)

    async def start(self) -> None:
        """Start the engine, with the text process beside it; ``close`` ends them, also after a failure.

        Raises:
            EngineError, PlannerError
        """
        self._news.progress("reading the model's description")
        model = await asyncio.to_thread(find_files, self._settings, source=self.source)
        self.sampling_defaults = sampling_defaults_of(self._settings, model, on_odd=self._news.engine)
        engine_start = EngineStart(
            settings=lambda: self._settings,
            source=self.source,
            in_force=self._in_force,
            journal=self._parts.journal,
            intents=self._intents,
            events=self._events,
            refactorings=self.refactorings,
            on_change=self._news.supervised,
            on_progress=self._news.progress,
            on_plan=self.metrics.planned,
            held=self._parts.held,
            planning=self._parts.planning,
            survivors=self._parts.survivors,
            why_closed=lambda: self._state.closed_because,
            parameters=self._parts.parameters,
            adapters=self.adapters,
        )
        self._text = await start_both(self._engines, self._settings, model, engine_start)
        self._further = engine_start.further

    async def check(self) -> None:
        """Say whether it could start as configured; starts nothing.

        Raises:
            EngineError, PlannerError
        """
        await asyncio.to_thread(check_start, self._settings, source=self.source, held=self._parts.held)

    def begin(self, *, devices: Callable[[], Sequence[Device]]) -> None:
        """Begin with what runs beside the service, and count as serving. ``devices`` looks at them, and blocks."""
        control, run_beside = self._control, self._news.run_beside
        run_beside(control, watch_text(self.text, on_failure=self._news.given_up), name="text-watch")
        control.push_async_callback(self.auto.close)
        run_beside(control, self.auto.run_forever(), name="auto")
        neighbourhood = neighbourhood_of(
            self._settings,
            parts=self._parts,
            in_force=self._in_force,
            load=self.load,
            refactorings=self.refactorings,
            devices=devices,
        )
        run_beside(control, neighbourhood.run_forever(), name="neighbourhood")
        run_beside(control, self.status.sample_forever(), name="status-sampler")
        self._state.serve()
        # Before anybody can ask for another change, for nothing has been awaited since.
        coming = self.refactorings.bring_back(self._further) if self._further else None
        run_beside(control, self._get_whole(coming), name="replicas-restored")

    def begin_drain(self, reason: str, *, closed_because: str = SHUTTING_DOWN) -> None:
        """Take no request and no change any more. ``closed_because``: why its engines end then."""
        self._state.drain(reason, closed_because=closed_because)

    async def end_control(self) -> None:
        """End what runs beside the service; requests go on. Idempotent."""
        await self._control.aclose()

    async def close(self) -> None:
        """End engine and text process. Idempotent."""
        await self._engines.aclose()
        self.auto.decided.close()

    def noted(self, event: Event) -> Intent | None:
        """Take one event of this model, and return its intent where the event changes that."""
        if event.kind is EventKind.REFACTORING and event.fields.get("state") == "ended":
            self.metrics.handover_ended(event.fields["record"])
        # What the end of the daemon breaks off is still asked for, as after `kill -9`.
        return None if self._state.is_draining else self._intents.after(event)

    # --- inside ---

    def _replicas(self) -> tuple[Replica, ...]:
        return () if self._in_force.replicas is None else self._in_force.replicas.all

    async def _get_whole(self, coming: Started | None) -> None:
        """Wait for replicas that come back. Until they are there, the start counts as one that may fail."""
        if coming is not None:
            await self.refactorings.ended(coming)
        await self._parts.survivors.end_others()
        self._parts.journal.got_ready()
