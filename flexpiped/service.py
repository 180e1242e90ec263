"""Puts the parts of the daemon together, starts them in order and, when the scope ends, ends them in reverse.

sockets -> admin API and a port that says "starting" -> model files -> engine and text process -> HTTP API -> ready
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from engines.errors import EngineDied
from engines.protocol import Engine
from engines.text.client import TextService
from flexpiped import log_events
from flexpiped.admin import admin_app
from flexpiped.admission import Admission, AdmissionLimits
from flexpiped.api.app import create_app
from flexpiped.api.backend import Backend
from flexpiped.api.metrics import Metrics
from flexpiped.engine_factory import Model, devices_of, engine_factory, engine_python, find_files, kv_cache_bytes
from flexpiped.events import EventKind, EventLog
from flexpiped.kv_carrier import KvCarrier
from flexpiped.models import model_source, served_name
from flexpiped.refactoring import Refactorings
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.servers import listen_tcp, serving, serving_admin, url_of
from flexpiped.settings import Settings
from flexpiped.starting_app import starting_app
from flexpiped.status import DaemonStatus, Health, Identity, ServiceState
from flexpiped.supervision import Supervision, SupervisorState
from flexpiped.supervisor import Supervisor
from flexpiped.target_resolver import PlannerResolver
from planner.layout import Pipeline

DRAIN_DEADLINE_S: Final = 30.0
_WATCH_PERIOD_S: Final = 1.0
_STATES: Final = {
    SupervisorState.STARTING: ServiceState.STARTING,
    SupervisorState.READY: ServiceState.READY,
    SupervisorState.RECOVERING: ServiceState.RECOVERING,
    SupervisorState.FAILED: ServiceState.FAILED,
    SupervisorState.CLOSING: ServiceState.DRAINING,
}


class Service:
    """Everything that serves one model.

    Args:
        on_progress: Told what the start is doing.
    """

    def __init__(self, settings: Settings, *, admin_socket: Path, on_progress: Callable[[str], None]) -> None:
        self._settings = settings
        self._admin_socket = admin_socket
        self._on_progress = on_progress
        self.source = model_source(settings)
        self.name = served_name(settings, self.source)
        self.events = EventLog()
        self.failed = asyncio.Event()  # the engine is gone for good
        self.api_url = ""
        self._phase = ServiceState.STARTING  # READY: it is the engine's state that counts
        self._reason = "starting"
        self._refactorings = Refactorings(
            engine=self._engine, resolver=self._planner, events=self.events, replica=self._replica
        )
        self._supervisor: Supervisor | None = None
        self._resolver: PlannerResolver | None = None
        self._text: TextService | None = None
        self._metrics = Metrics()

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
    def pipeline(self) -> Pipeline | None:
        """The pipeline in force, None before there is one."""
        return None if self._supervisor is None else self._supervisor.pipeline

    async def start(self, stack: AsyncExitStack) -> None:
        """Start everything; ``stack`` ends it. Returns when requests are served.

        Raises:
            PortTaken, AdminSocketError, EngineError, PlannerError
        """
        listener = listen_tcp(self._settings.http.host, self._settings.http.port)
        stack.callback(listener.close)
        self.api_url = f"{url_of(listener)}/v1"
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
                admission=Admission(limits=_limits(self._settings)),
                metrics=self._metrics,
                health=lambda: self.health,
            ),
            max_body_bytes=self._settings.http.max_body_bytes,
        )
        await stack.enter_async_context(serving(app, listener.dup(), shutdown_s=DRAIN_DEADLINE_S))
        await gate.aclose()
        self._run_beside(stack, self._watch_text(text), name="text-watch")
        stack.callback(self._begin_drain)
        self._phase, self._text = ServiceState.READY, text

    async def _open_admin(self, stack: AsyncExitStack) -> None:
        status = DaemonStatus(
            identity=Identity(
                model_name=self.name,
                model_path=self.source,
                engine=self._settings.engine.value,
                api_url=self.api_url,
            ),
            health=lambda: self.health,
            engine=self._engine,
            refactorings=self._refactorings,
            latencies=self._metrics.latencies,
        )
        app = admin_app(status=status, refactorings=self._refactorings, events=self.events)
        await stack.enter_async_context(serving_admin(app, self._admin_socket))
        stack.callback(self.events.close)
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
        settings = self._settings
        self._progress("planning the layout")
        resolver = PlannerResolver(
            graph=model.graph, devices=devices_of(settings), kv_cache_bytes=kv_cache_bytes(settings)
        )
        pipeline = await asyncio.to_thread(resolver.first, settings.stages)
        supervisor = Supervisor(
            factory=engine_factory(settings, model),
            pipeline=pipeline,
            on_change=self._on_supervision,
            on_progress=self._progress,
        )
        stack.push_async_callback(supervisor.close)
        stack.push_async_callback(self._refactorings.close)
        self._resolver, self._supervisor = resolver, supervisor
        self._progress("starting the engine")
        await supervisor.start()
        return supervisor

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

    def _replica(self, target: Pipeline) -> ReplicaRunner:
        if self._supervisor is None:
            raise EngineDied(f"no engine serves now: {self.health.reason}")
        carrier = KvCarrier(
            kv_bytes_per_token=self._planner().kv_bytes_per_token, preference=self._settings.handover.kv
        )
        return ReplicaRunner(self._supervisor, target, carrier=carrier)

    def _planner(self) -> PlannerResolver:
        if self._resolver is None:
            raise EngineDied(f"no engine serves now: {self.health.reason}")
        return self._resolver


def _limits(settings: Settings) -> AdmissionLimits:
    return AdmissionLimits(
        max_requests_in_flight=settings.admission.max_requests_in_flight,
        max_tokens_in_flight=settings.admission.max_tokens_in_flight,
    )


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
