"""Puts the parts of the daemon together, starts them in order and, when the scope ends, ends them in reverse.

sockets -> admin API and a port that says "starting" -> model files -> engine and text process -> HTTP API -> ready
"""

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, Final

from aiohttp import web

import flexpiped
from engines.text.client import TextService
from flexpiped import log_events
from flexpiped.admin import admin_app
from flexpiped.admin_auto import auto_routes
from flexpiped.admin_changes import Changes
from flexpiped.admin_config import Configuration, config_routes
from flexpiped.admin_history import history_routes
from flexpiped.admin_profile import profile_routes
from flexpiped.admission import Admission, AdmissionLimits
from flexpiped.api.app import create_app
from flexpiped.api.backend import Backend
from flexpiped.api.forwarding import OWN_PATHS
from flexpiped.api.metrics import Metrics
from flexpiped.auto import DECISIONS_KEPT, AutoControl
from flexpiped.auto_candidates import PlannedCandidates
from flexpiped.background import run_beside
from flexpiped.config_values import Auto
from flexpiped.connections import ConnectionLimits
from flexpiped.dashboard.feed import Feed, Sources
from flexpiped.dashboard.routes import Dashboard
from flexpiped.engine_factory import Model, engine_python, find_files
from flexpiped.engine_in_force import EngineInForce
from flexpiped.engine_start import EngineStart
from flexpiped.events import Event, EventKind, EventLog
from flexpiped.hardware import Hardware
from flexpiped.intent import IntentKeeper, basis_of
from flexpiped.journal import Journal, JournalError, journal_of
from flexpiped.keys import KeyRing
from flexpiped.load_monitor import LoadSampler
from flexpiped.models import model_source, served_name
from flexpiped.neighbourhood import Neighbourhood
from flexpiped.plan_wire import answer_to_wire
from flexpiped.planner_question import slo_of, workload_of
from flexpiped.refactoring import Refactorings, Started
from flexpiped.reload import load_files
from flexpiped.replicas import Replicas
from flexpiped.servers import listen_tcp, serving, serving_admin, url_of
from flexpiped.settings import Settings
from flexpiped.spans import spans_of
from flexpiped.starting_app import starting_app
from flexpiped.status import DaemonStatus, Health, Identity, ServiceState
from flexpiped.supervision import Supervision, SupervisorState
from flexpiped.tls import LiveTls
from flexpiped.tracing import Handovers, TracedLoad, traced
from flexpiped.watches import watch_hardware, watch_text
from planner.layout import Pipeline
from planner.neighbourhood import NeighbourConstants

DRAIN_DEADLINE_S: Final = 30.0
TRACED: Final = frozenset({"/v1/completions", "/v1/chat/completions", *OWN_PATHS})
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
        KeyFileError, TlsError, TracingUnavailable
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
        self._keys, tls = load_files(settings)
        self._tls = None if tls is None else LiveTls(tls)
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
        self._in_force = EngineInForce(
            settings=lambda: self._settings, reason=lambda: self.health.reason, against_change=self._against_change
        )
        self._refactorings = Refactorings(
            engine=self._in_force.engine_to_change,
            resolver=lambda: self._in_force.offer().resolver,
            events=self.events,
            replica=self._in_force.replica,
            fleet=self._in_force.fleet,
            other_engine=self._in_force.other,
            settled=lambda: self._journal.settled(),
        )
        self._journal: Journal = journal_of(
            settings.journal, environment=os.environ, instance=str(admin_socket), on_failure=log_events.journal_failed
        )
        self._changes = Changes(
            refactorings=self._refactorings, events=self.events, plans=self, settled=lambda: self._journal.settled()
        )
        self._intents = IntentKeeper(basis=basis_of(settings), in_force=self._in_force.intended, intent=None)
        self._text: TextService | None = None
        self._load = LoadSampler(
            windows_s=settings.auto.windows_s,
            memory_s=settings.auto.latency_window_s,
            stale_after_s=settings.auto.stale_after_s,
        )
        self._spans, self._handovers = spans_of(settings.tracing, model=self.name), Handovers()
        self._metrics = Metrics(listener=self._load if self._spans is None else TracedLoad(self._load))
        self._candidates = PlannedCandidates(
            resolver=lambda: self._in_force.offer().resolver,
            serving=lambda: self._in_force.known_replicas().pipelines,
            start_s=lambda num_stages: self._in_force.offer().starts.expected_s(num_stages),
            expected=workload_of(settings),
            slo=slo_of(settings),
        )
        self._auto = AutoControl(
            settings.auto,
            engine=self._in_force.engine_to_change,
            load=self._load,
            candidates=self._candidates,
            refactorings=self._refactorings,
            rest=lambda: self._in_force.replicas,
            fleet=lambda: self._in_force.fleet.serving,
            engines=lambda: self._in_force.known_replicas().engines,
            decided=EventLog(capacity=DECISIONS_KEPT, on_publish=self._tell_change),
        )

    @property
    def health(self) -> Health:
        """The state of the service: what the daemon is doing comes first, then what the engine is doing."""
        replicas = self._in_force.replicas
        if self._phase is not ServiceState.READY or replicas is None:
            return Health(state=self._phase, reason=self._reason)
        if self._text is not None and self._text.failure is not None:
            return Health(state=ServiceState.FAILED, reason=self._text.failure)
        supervision = replicas.supervision
        state = _STATES[supervision.state]
        return Health(state=state, reason="" if state is ServiceState.READY else supervision.reason)

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline in force, None before there is one."""
        return self._in_force.pipeline

    @property
    def max_stages(self) -> int:
        """How many stages the engine in force could have on the devices that are here."""
        return self._in_force.offer().resolver.max_stages

    async def plan(self, stages: int | Auto) -> dict[str, Any]:
        """Return what the planner would do now, with every candidate; moves nothing.

        Raises:
            PlannerError, EngineError
        """
        engine, resolver = self._in_force.engine(), self._in_force.offer().resolver
        began_s = time.monotonic()
        answer = await asyncio.to_thread(
            resolver.answer, stages, current=engine.pipeline, resident=engine.capabilities.resident
        )
        return answer_to_wire(answer, took_s=time.monotonic() - began_s)

    def apply(self, settings: Settings, *, keys: KeyRing | None, tls: ssl.SSLContext | None) -> None:
        """Use what ``settings`` say of what is live, and the API keys and certificate that their files hold now.

        What is started later is started with them.
        """
        self._settings = settings
        self._keys = keys
        if self._tls is not None and tls is not None:
            self._tls.current = tls
        self._admission.limits = _limits(settings)
        self._candidates.expect(workload_of(settings), slo_of(settings))
        self._in_force.use(settings)

    async def start(self, stack: AsyncExitStack) -> None:
        """Start everything; ``stack`` ends it. Returns when requests are served.

        Raises:
            PortTaken, AdminSocketError, EngineError, PlannerError
        """
        listener = listen_tcp(self._settings.http.host, self._settings.http.port)
        stack.callback(listener.close)
        self.api_url = f"{url_of(listener, is_tls=self._tls is not None)}/v1"
        await self._open_journal(stack)
        hardware, status = Hardware(self._settings, python=engine_python(self._settings)), self._daemon_status()
        feed = self._feed_dashboards(stack, status, hardware)
        pages = Dashboard(
            feed=feed,
            changes=self._changes,
            mode=lambda: self._settings.http.dashboard,
            keys=lambda: self._keys,
        ).routes()
        gate = await stack.enter_async_context(AsyncExitStack())
        first = starting_app(lambda: self.health, keys=lambda: self._keys, further=pages)
        await gate.enter_async_context(self._serving(first, listener, shutdown_s=1.0))
        await self._open_admin(stack, hardware, status)
        self._progress("reading the model's description")
        model = await asyncio.to_thread(find_files, self._settings, source=self.source)
        engine_start = self._engine_start()
        replicas, text = await self._start_engine(stack, model, engine_start)
        app = create_app(
            Backend(
                model=self.name,
                serving=replicas,
                text=text,
                admission=self._admission,
                keys=lambda: self._keys,
                body_deadline_s=self._settings.http.body_deadline_s,
                metrics=self._metrics,
                health=lambda: self.health,
                devices=hardware.devices,
            ),
            max_body_bytes=self._settings.http.max_body_bytes,
            further=pages,
            outermost=() if self._spans is None else (traced(self._spans, handovers=self._handovers, paths=TRACED),),
        )
        if self._spans is not None:
            stack.push_async_callback(asyncio.to_thread, self._spans.close)
        await stack.enter_async_context(self._serving(app, listener, shutdown_s=DRAIN_DEADLINE_S))
        feed.end_streams("it serves now")
        await gate.aclose()
        self._run_beside(stack, watch_text(text, on_failure=self._fail), name="text-watch")
        stack.push_async_callback(self._auto.close)
        self._run_beside(stack, self._auto.run_forever(), name="auto")
        self._run_beside(stack, self._neighbourhood(hardware).run_forever(), name="neighbourhood")
        stack.callback(feed.close, "the daemon ends")
        stack.callback(self._begin_drain)
        self._phase, self._text = ServiceState.READY, text
        # Before anybody can ask for another change, for nothing has been awaited since.
        coming = self._refactorings.bring_back(engine_start.further) if engine_start.further else None
        self._run_beside(stack, self._get_whole(coming), name="replicas-restored")

    async def _get_whole(self, coming: Started | None) -> None:
        """Wait for replicas that come back. Until they are there, the start counts as one that may fail."""
        if coming is not None:
            await self._refactorings.ended(coming)
        self._journal.got_ready()

    def _neighbourhood(self, hardware: Hardware) -> Neighbourhood:
        devices = self._settings.devices
        return Neighbourhood(
            NeighbourConstants(keep_free_bytes=devices.keep_free_bytes, grow_after_s=devices.grow_after_s),
            replicas=lambda: self._in_force.known_replicas().all,
            kv_bytes_per_token=lambda: self._in_force.offer().resolver.kv_bytes_per_token,
            devices=hardware.devices,
            refactorings=self._refactorings,
            events=self.events,
        )

    def _serving(
        self, app: web.Application, listener: socket.socket, *, shutdown_s: float
    ) -> AbstractAsyncContextManager[None]:
        http = self._settings.http
        return serving(
            app,
            listener.dup(),
            shutdown_s=shutdown_s,
            limits=ConnectionLimits(
                header_deadline_s=http.header_deadline_s, max_header_line_bytes=http.max_header_line_bytes
            ),
            tls=None if self._tls is None else self._tls.front,
        )

    async def _open_journal(self, stack: AsyncExitStack) -> None:
        """Open it; where that cannot be, the daemon serves without, and says so."""
        stack.push_async_callback(asyncio.to_thread, self._journal.close)
        try:
            await asyncio.to_thread(self._journal.open)
        except JournalError as error:
            log_events.journal_failed(reason=str(error))
            self.events.publish(EventKind.DAEMON, f"journal failed: {error}")
        self.events.publish(EventKind.DAEMON, f"starting flexpiped {flexpiped.__version__} with {self.source}")

    def _daemon_status(self) -> DaemonStatus:
        return DaemonStatus(
            identity=Identity(
                model_name=self.name,
                model_path=self.source,
                api_url=self.api_url,
            ),
            engine_name=lambda: self._in_force.name,
            health=lambda: self.health,
            engine=self._in_force.engine,
            refactorings=self._refactorings,
            latencies=self._metrics.latencies,
            fleet=lambda: () if self._in_force.replicas is None else self._in_force.replicas.status(),
            auto=lambda: {"mode": self._auto.mode.value, "decision": self._auto.last},
        )

    def _feed_dashboards(self, stack: AsyncExitStack, status: DaemonStatus, hardware: Hardware) -> Feed:
        feed = Feed(
            Sources(
                status=status,
                tokens_per_s=lambda: status.tokens_per_s,
                load=self._load.observe,
                events=self.events,
                decisions=self._auto.decided,
                topology=hardware.look,
            )
        )
        self._run_beside(stack, feed.run_forever(), name="dashboard-feed")
        return feed

    async def _open_admin(self, stack: AsyncExitStack, hardware: Hardware, status: DaemonStatus) -> None:
        profiles = profile_routes(self._settings, source=self.source, environment=os.environ)
        app = admin_app(
            status=status,
            changes=self._changes,
            events=self.events,
            hardware=hardware,
            further=(
                *profiles.routes(),
                *history_routes(self._journal),
                *auto_routes(self._auto, events=self.events),
                *config_routes(self._configuration),
            ),
        )
        await stack.enter_async_context(serving_admin(app, self._admin_socket))
        stack.callback(self.events.close)
        stack.callback(self._auto.decided.close)
        self._run_beside(stack, watch_hardware(hardware, self.events), name="hardware-watch")
        self._run_beside(stack, status.sample_forever(), name="status-sampler")

    async def _start_engine(
        self, stack: AsyncExitStack, model: Model, engine_start: EngineStart
    ) -> tuple[Replicas, TextService]:
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
                planned = starting.create_task(engine_start.run(stack, model))
        except ExceptionGroup as group:  # the first that failed; the other was cancelled
            raise group.exceptions[0] from None
        return planned.result(), text

    def _engine_start(self) -> EngineStart:
        return EngineStart(
            settings=lambda: self._settings,
            source=self.source,
            in_force=self._in_force,
            journal=self._journal,
            intents=self._intents,
            events=self.events,
            refactorings=self._refactorings,
            on_change=self._on_supervision,
            on_progress=self._progress,
            on_plan=self._metrics.planned,
        )

    def _keep(self, event: Event) -> None:
        """Have the journal keep what happens; progress is only for those who watch."""
        self._handovers.note(event)
        if event.kind is EventKind.REFACTORING and event.fields.get("state") == "ended":
            self._metrics.handover_ended(event.fields["record"])
        if event.fields.get("state") != "progress":
            # What the end of the daemon breaks off is still asked for, as after `kill -9`.
            intent = None if self._phase is ServiceState.DRAINING else self._intents.after(event)
            self._journal.record(event, intent)

    def _tell_change(self, decision: Event) -> None:
        """Count it; a decision that changes something belongs to what happened, and to the journal."""
        self._metrics.decided(decision.fields["verb"])
        if decision.fields["verb"] != "keep":
            self.events.publish(EventKind.DECISION, decision.message, **decision.fields)

    def _on_supervision(self, number: int, supervision: Supervision) -> None:
        """Tell how a replica fares. One that fails for good is the end only where no other one may serve."""
        replicas = () if self._in_force.replicas is None else self._in_force.replicas.all
        reason = f"replica {number}: {supervision.reason}" if len(replicas) > 1 else supervision.reason
        self.events.publish(EventKind.ENGINE, reason, state=supervision.state.value, replica=number)
        match supervision.state:
            case SupervisorState.RECOVERING:
                log_events.engine_recovering(reason=reason)
            case SupervisorState.FAILED if all(each.has_failed for each in replicas):
                self._fail(reason)
            case SupervisorState.FAILED:
                log_events.engine_failed(reason=reason)
            case _:
                pass

    def _fail(self, reason: str) -> None:
        log_events.engine_failed(reason=reason)
        self.failed.set()

    def _run_beside(self, stack: AsyncExitStack, work: Coroutine[None, None, None], *, name: str) -> None:
        run_beside(stack, work, name=name, on_failure=lambda said: self.events.publish(EventKind.DAEMON, said))

    def _against_change(self) -> str:
        if self._phase is ServiceState.DRAINING:
            return f"the daemon is draining: {self._reason}"
        replicas = self._in_force.replicas
        if self._phase is ServiceState.STARTING and replicas is not None and replicas.engine is not None:
            return f"the daemon is starting: {self._reason}"  # those replicas come first that are to come back
        return ""

    def _progress(self, message: str) -> None:
        self._reason = message
        self._on_progress(message)

    def _begin_drain(self) -> None:
        self._phase, self._reason = ServiceState.DRAINING, "streams in flight are finishing"
        self.events.publish(EventKind.DAEMON, f"draining: {self._reason}")


def _limits(settings: Settings) -> AdmissionLimits:
    return AdmissionLimits(
        max_requests_in_flight=settings.admission.max_requests_in_flight,
        max_tokens_in_flight=settings.admission.max_tokens_in_flight,
        max_requests_queued=settings.admission.max_requests_queued,
        queue_deadline_s=settings.admission.queue_deadline_s,
    )
