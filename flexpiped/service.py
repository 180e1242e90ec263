"""Puts the parts of the daemon together, starts them in order and, when the scope ends, ends them in reverse.

sockets -> admin API and a port that says "starting" -> model files -> engine and text process -> HTTP API -> ready
"""

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import flexpiped
from engines.errors import EngineDied, EngineError, RefactoringRefused
from engines.protocol import Engine
from engines.text.client import TextService
from flexpiped import log_events
from flexpiped.admin import admin_app
from flexpiped.admin_auto import auto_routes
from flexpiped.admin_config import Configuration, config_routes
from flexpiped.admin_history import history_routes
from flexpiped.admin_profile import profile_routes
from flexpiped.admission import Admission, AdmissionLimits
from flexpiped.api.app import create_app
from flexpiped.api.backend import Backend
from flexpiped.api.metrics import Metrics
from flexpiped.auto import DECISIONS_KEPT, AutoControl
from flexpiped.auto_candidates import PlannedCandidates
from flexpiped.config_values import Auto
from flexpiped.engine_factory import Model, engine_python, find_files
from flexpiped.engine_offers import EngineOffer, EngineOffers
from flexpiped.events import Event, EventKind, EventLog
from flexpiped.handover_records import TargetResolver
from flexpiped.hardware import Hardware
from flexpiped.intent import IntentKeeper, basis_of
from flexpiped.journal import Journal, JournalError, journal_of
from flexpiped.keys import KeyRing, load_keys
from flexpiped.kv_carrier import KvCarrier
from flexpiped.load_monitor import LoadSampler
from flexpiped.models import model_source, served_name
from flexpiped.plan_wire import answer_to_wire
from flexpiped.planner_question import slo_of, workload_of
from flexpiped.refactoring import Refactorings
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.restore import Beginning, restored
from flexpiped.servers import listen_tcp, serving, serving_admin, url_of
from flexpiped.settings import Settings
from flexpiped.starting_app import starting_app
from flexpiped.status import DaemonStatus, Health, Identity, ServiceState
from flexpiped.supervision import Supervision, SupervisorState
from flexpiped.supervisor import Supervisor
from planner.layout import Pipeline
from planner.replica_steps import ReplicaLimits

DRAIN_DEADLINE_S: Final = 30.0
_WATCH_PERIOD_S: Final = 1.0
_HARDWARE_PERIOD_S: Final = 15.0
_STATES: Final = {
    SupervisorState.STARTING: ServiceState.STARTING,
    SupervisorState.READY: ServiceState.READY,
    SupervisorState.RECOVERING: ServiceState.RECOVERING,
    SupervisorState.ASLEEP: ServiceState.ASLEEP,
    SupervisorState.FAILED: ServiceState.FAILED,
    SupervisorState.CLOSING: ServiceState.DRAINING,
}


class Service:
    """Everything that serves one model.

    Args:
        on_progress: Told what the start is doing.
        configuration: What the admin API shows and reloads.

    Raises:
        KeyFileError
    """

    def __init__(
        self,
        settings: Settings,
        *,
        admin_socket: Path,
        on_progress: Callable[[str], None],
        configuration: Configuration,
    ) -> None:
        self._settings = settings
        self._configuration = configuration
        self._keys = None if settings.http.api_keys is None else load_keys(settings.http.api_keys)
        self._admission = Admission(limits=_limits(settings))
        self._admin_socket = admin_socket
        self._on_progress = on_progress
        self.source = model_source(settings)
        self.name = served_name(settings, self.source)
        self.events = EventLog(on_publish=self._keep)
        self.failed = asyncio.Event()  # the engine is gone for good
        self.api_url = ""
        self._phase = ServiceState.STARTING  # READY: it is the engine's state that counts
        self._reason = "starting"
        self._refactorings = Refactorings(
            engine=self._engine_to_change,
            resolver=lambda: self._offer().resolver,
            events=self.events,
            replica=lambda target: self._replica(target, self._offer()),
            other_engine=self._other_engine,
            settled=lambda: self._journal.settled(),
        )
        self._journal: Journal = journal_of(
            settings.journal, environment=os.environ, instance=str(admin_socket), on_failure=log_events.journal_failed
        )
        self._intents = IntentKeeper(basis=basis_of(settings), in_force=self._in_force, intent=None)
        self._supervisor: Supervisor | None = None
        self._offers: EngineOffers | None = None
        self._text: TextService | None = None
        self._load = LoadSampler(
            windows_s=settings.auto.windows_s,
            memory_s=settings.auto.latency_window_s,
            stale_after_s=settings.auto.stale_after_s,
        )
        self._metrics = Metrics(listener=self._load)
        self._candidates = PlannedCandidates(
            resolver=lambda: self._offer().resolver, expected=workload_of(settings), slo=slo_of(settings)
        )
        self._auto = AutoControl(
            settings.auto,
            engine=self._engine_to_change,
            load=self._load,
            candidates=self._candidates,
            refactorings=self._refactorings,
            rest=lambda: self._supervisor,
            decided=EventLog(capacity=DECISIONS_KEPT, on_publish=self._tell_change),
        )

    @property
    def health(self) -> Health:
        """The state of the service: what the daemon is doing comes first, then what the engine is doing."""
        if self._phase is not ServiceState.READY or self._supervisor is None:
            return Health(state=self._phase, reason=self._reason)
        if self._text is not None and self._text.failure is not None:
            return Health(state=ServiceState.FAILED, reason=self._text.failure)
        supervision = self._supervisor.supervision
        state = _STATES[supervision.state]
        return Health(state=state, reason="" if state is ServiceState.READY else supervision.reason)

    @property
    def engine_name(self) -> str:
        """The engine in force; before there is one, the one that is configured."""
        capabilities = None if self._supervisor is None else self._supervisor.capabilities
        return self._settings.engine.value if capabilities is None else capabilities.name

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline in force, None before there is one."""
        return None if self._supervisor is None else self._supervisor.pipeline

    async def plan(self, stages: int | Auto) -> dict[str, Any]:
        """Return what the planner would do now, with every candidate; moves nothing.

        Raises:
            PlannerError, EngineError
        """
        engine, resolver = self._engine(), self._offer().resolver
        began_s = time.monotonic()
        answer = await asyncio.to_thread(
            resolver.answer, stages, current=engine.pipeline, resident=engine.capabilities.resident
        )
        return answer_to_wire(answer, took_s=time.monotonic() - began_s)

    def apply(self, settings: Settings, *, keys: KeyRing | None) -> None:
        """Use what ``settings`` say of what is live, and the API keys that their file holds now.

        What is started later is started with them.
        """
        self._settings = settings
        self._keys = keys
        self._admission.limits = _limits(settings)
        self._candidates.expect(workload_of(settings), slo_of(settings))
        if self._supervisor is not None:
            self._supervisor.wait_deadline_s = settings.admission.engine_wait_s
        if self._offers is not None:
            self._offers.use(settings)

    async def start(self, stack: AsyncExitStack) -> None:
        """Start everything; ``stack`` ends it. Returns when requests are served.

        Raises:
            PortTaken, AdminSocketError, EngineError, PlannerError
        """
        listener = listen_tcp(self._settings.http.host, self._settings.http.port)
        stack.callback(listener.close)
        self.api_url = f"{url_of(listener)}/v1"
        await self._open_journal(stack)
        gate = await stack.enter_async_context(AsyncExitStack())
        await gate.enter_async_context(serving(starting_app(lambda: self.health), listener.dup(), shutdown_s=1.0))
        await self._open_admin(stack)
        self._progress("reading the model's description")
        model = await asyncio.to_thread(find_files, self._settings, source=self.source)
        supervisor, text = await self._start_engine(stack, model)
        app = create_app(
            Backend(
                model=self.name,
                supervisor=supervisor,
                text=text,
                admission=self._admission,
                keys=lambda: self._keys,
                body_deadline_s=self._settings.http.body_deadline_s,
                metrics=self._metrics,
                health=lambda: self.health,
            ),
            max_body_bytes=self._settings.http.max_body_bytes,
        )
        await stack.enter_async_context(serving(app, listener.dup(), shutdown_s=DRAIN_DEADLINE_S))
        await gate.aclose()
        self._run_beside(stack, self._watch_text(text), name="text-watch")
        stack.push_async_callback(self._auto.close)
        self._run_beside(stack, self._auto.run_forever(), name="auto")
        stack.callback(self._begin_drain)
        self._phase, self._text = ServiceState.READY, text
        self._journal.got_ready()

    async def _open_journal(self, stack: AsyncExitStack) -> None:
        """Open it; where that cannot be, the daemon serves without, and says so."""
        stack.push_async_callback(asyncio.to_thread, self._journal.close)
        try:
            await asyncio.to_thread(self._journal.open)
        except JournalError as error:
            log_events.journal_failed(reason=str(error))
            self.events.publish(EventKind.DAEMON, f"journal failed: {error}")
        self.events.publish(EventKind.DAEMON, f"starting flexpiped {flexpiped.__version__} with {self.source}")

    async def _open_admin(self, stack: AsyncExitStack) -> None:
        status = DaemonStatus(
            identity=Identity(
                model_name=self.name,
                model_path=self.source,
                api_url=self.api_url,
            ),
            engine_name=lambda: self.engine_name,
            health=lambda: self.health,
            engine=self._engine,
            refactorings=self._refactorings,
            latencies=self._metrics.latencies,
            auto=lambda: {"mode": self._auto.mode.value, "decision": self._auto.last},
        )
        hardware = Hardware(self._settings, python=engine_python(self._settings))
        profiles = profile_routes(self._settings, source=self.source, environment=os.environ)
        app = admin_app(
            status=status,
            refactorings=self._refactorings,
            events=self.events,
            hardware=hardware,
            plans=self,
            further=(
                *profiles.routes(),
                *history_routes(self._journal),
                *auto_routes(self._auto, events=self.events),
                *config_routes(self._configuration),
            ),
            settled=self._journal.settled,
        )
        await stack.enter_async_context(serving_admin(app, self._admin_socket))
        stack.callback(self.events.close)
        stack.callback(self._auto.decided.close)
        self._run_beside(stack, self._watch_hardware(hardware), name="hardware-watch")
        self._run_beside(stack, status.sample_forever(), name="status-sampler")

    async def _start_engine(self, stack: AsyncExitStack, model: Model) -> tuple[Supervisor, TextService]:
        """Start the text process, and beside it plan the layout and start the engine."""
        text = TextService(
            model=model.tokenizer_directory,
            python=engine_python(self._settings),
            on_death=lambda reason: log_events.text_process_died(reason=reason),
        )
        stack.push_async_callback(text.close)
        try:
            async with asyncio.TaskGroup() as starting:
                starting.create_task(text.start())
                planned = starting.create_task(self._start_supervisor(stack, model))
        except ExceptionGroup as group:  # the first that failed; the other was cancelled
            raise group.exceptions[0] from None
        return planned.result(), text

    async def _start_supervisor(self, stack: AsyncExitStack, model: Model) -> Supervisor:
        self._progress("planning the layout")
        offers = await asyncio.to_thread(
            EngineOffers,
            self._settings,
            source=self.source,
            model=model,
            on_news=lambda news: self.events.publish(EventKind.ENGINE, news),
        )
        self._offers = offers
        offers.use(self._settings)  # a reload may have come while they were made
        last = await self._last_layout(offers, num_decoders=model.graph.num_decoders)
        if last is not None:
            try:
                return await self._supervise(stack, last)
            except EngineError as error:
                await asyncio.to_thread(self._journal.forget_intent)
                self._not_restored(f"the engine did not start with it: {error}")
        configured = offers.of(self._settings.engine.value)
        pipeline = await asyncio.to_thread(configured.resolver.first, self._settings.stages)
        return await self._supervise(
            stack,
            Beginning(offer=configured, engine=self._settings.engine.value, pipeline=pipeline, reason="as configured"),
        )

    async def _last_layout(self, offers: EngineOffers, *, num_decoders: int) -> Beginning | None:
        """Return what was last asked for, None where there is nothing or it cannot be; the reason is told."""
        if not self._settings.journal.restore or self._journal.failure:
            return None
        try:
            stored = await asyncio.to_thread(self._journal.stored)
        except JournalError as error:
            self._not_restored(str(error))
            return None
        if stored is None:
            return None
        beginning, against = await asyncio.to_thread(
            restored, stored, offers, basis=basis_of(self._settings), num_decoders=num_decoders
        )
        if beginning is None:
            await asyncio.to_thread(self._journal.forget_intent)
            self._not_restored(against)
            return None
        self._intents.intent = stored.intent
        await asyncio.to_thread(self._journal.begin_start)
        stages = beginning.pipeline.granularity
        log_events.layout_restored(engine=beginning.engine, stages=stages, reason=beginning.reason)
        self.events.publish(EventKind.DAEMON, f"last layout restored: {stages} stages, {beginning.reason}")
        return beginning

    def _not_restored(self, reason: str) -> None:
        self._intents.intent = None
        log_events.layout_not_restored(reason=reason)
        self.events.publish(EventKind.DAEMON, f"last layout not restored: {reason}")

    async def _supervise(self, stack: AsyncExitStack, beginning: Beginning) -> Supervisor:
        """Start an engine, to be started again whenever it dies.

        Raises:
            EngineError: It did not start.
        """
        supervisor = Supervisor(
            factory=beginning.offer.factory,
            pipeline=beginning.pipeline,
            wait_deadline_s=self._settings.admission.engine_wait_s,
            on_change=self._on_supervision,
            on_progress=self._progress,
        )
        stack.push_async_callback(supervisor.close)
        stack.push_async_callback(self._refactorings.close)
        self._supervisor = supervisor
        self._progress("starting the engine")
        await supervisor.start()
        return supervisor

    def _keep(self, event: Event) -> None:
        """Have the journal keep what happens; progress is only for those who watch."""
        if event.kind is EventKind.REFACTORING and event.fields.get("state") == "ended":
            self._metrics.handover_ended(event.fields["record"])
        if event.fields.get("state") != "progress":
            self._journal.record(event, self._intents.after(event))

    def _in_force(self) -> tuple[str, Pipeline] | None:
        """Return engine and pipeline of now; while an engine is started again, those with which it will be."""
        return None if self._supervisor is None else (self.engine_name, self._supervisor.pipeline)

    def _tell_change(self, decision: Event) -> None:
        """A decision that changes something belongs to what happened, and to the journal."""
        if decision.fields["verb"] != "keep":
            self.events.publish(EventKind.DECISION, decision.message, **decision.fields)

    def _on_supervision(self, supervision: Supervision) -> None:
        self.events.publish(EventKind.ENGINE, supervision.reason, state=supervision.state.value)
        match supervision.state:
            case SupervisorState.RECOVERING:
                log_events.engine_recovering(reason=supervision.reason)
            case SupervisorState.FAILED:
                log_events.engine_failed(reason=supervision.reason)
                self.failed.set()
            case _:
                pass

    async def _watch_text(self, text: TextService) -> None:
        """The text process is started again when it dies; when that has been given up, the service has failed."""
        while text.failure is None:  # noqa: ASYNC110  it is a property, not an event
            await asyncio.sleep(_WATCH_PERIOD_S)
        log_events.engine_failed(reason=text.failure)
        self.failed.set()

    async def _watch_hardware(self, hardware: Hardware) -> None:
        """Tell of GPUs that come, leave or get worse; ends where there is no driver to ask."""
        while hardware.may_change:
            for change in await asyncio.to_thread(hardware.news):
                self.events.publish(
                    EventKind.DEVICES, change.sentence, change=change.kind.value, device=change.device_id
                )
            await asyncio.sleep(_HARDWARE_PERIOD_S)

    def _run_beside(self, stack: AsyncExitStack, work: Coroutine[None, None, None], *, name: str) -> None:
        stack.push_async_callback(_end, asyncio.create_task(work, name=name))

    def _progress(self, message: str) -> None:
        self._reason = message
        self._on_progress(message)

    def _begin_drain(self) -> None:
        self._phase, self._reason = ServiceState.DRAINING, "streams in flight are finishing"
        self.events.publish(EventKind.DAEMON, f"draining: {self._reason}")

    def _engine(self) -> Engine:
        if self._supervisor is None or self._supervisor.engine is None:
            raise EngineDied(f"no engine serves now: {self.health.reason}")
        return self._supervisor.engine

    def _engine_to_change(self) -> Engine:
        if self._phase is ServiceState.DRAINING:
            raise RefactoringRefused(f"the daemon is draining: {self._reason}")
        return self._engine()

    def _replica(self, target: Pipeline, offer: EngineOffer) -> ReplicaRunner:
        if self._supervisor is None:
            raise EngineDied(f"no engine serves now: {self.health.reason}")
        handover = self._settings.handover
        return ReplicaRunner(
            self._supervisor,
            target,
            factory=offer.factory,
            carrier=KvCarrier(kv_bytes_per_token=offer.resolver.kv_bytes_per_token, preference=handover.kv),
            limits=ReplicaLimits(drain_deadline_s=handover.drain_deadline_s),
        )

    def _offer(self) -> EngineOffer:
        """Return the kind of engine that is in force."""
        return self._known_offers().of(self.engine_name)

    def _other_engine(self, name: str) -> "_Other":
        offer = self._known_offers().of(name)
        return _Other(offer.resolver, lambda target: self._replica(target, offer))

    def _known_offers(self) -> EngineOffers:
        if self._offers is None:
            raise EngineDied(f"no engine serves now: {self.health.reason}")
        return self._offers


@dataclass(frozen=True, slots=True)
class _Other:
    """An ``OtherEngine``."""

    resolver: TargetResolver
    replica: Callable[[Pipeline], ReplicaRunner]


def _limits(settings: Settings) -> AdmissionLimits:
    return AdmissionLimits(
        max_requests_in_flight=settings.admission.max_requests_in_flight,
        max_tokens_in_flight=settings.admission.max_tokens_in_flight,
        max_requests_queued=settings.admission.max_requests_queued,
        queue_deadline_s=settings.admission.queue_deadline_s,
    )


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
