"""Puts the parts of the daemon together, starts them in order and, when the scope ends, ends them in reverse.

sockets -> admin API and a port that says "starting" -> the model (``flexpiped.model_service``) -> HTTP API -> ready
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, Final

from aiohttp import web

import flexpiped
from flexpiped import log_events
from flexpiped.admin import admin_app
from flexpiped.admin_auto import auto_routes
from flexpiped.admin_config import Configuration, config_routes
from flexpiped.admin_history import history_routes
from flexpiped.admin_profile import profile_routes
from flexpiped.admission import Admission, AdmissionLimits
from flexpiped.api.app import create_app
from flexpiped.api.backend import Backend
from flexpiped.api.forwarding import OWN_PATHS
from flexpiped.background import run_beside
from flexpiped.config_values import Auto
from flexpiped.connections import ConnectionLimits
from flexpiped.dashboard.feed import Feed, Sources
from flexpiped.dashboard.routes import Dashboard
from flexpiped.events import Event, EventKind, EventLog
from flexpiped.hardware import Hardware
from flexpiped.journal import Journal, JournalError, journal_of
from flexpiped.keys import KeyRing
from flexpiped.model_service import ModelService
from flexpiped.models import model_source, served_name
from flexpiped.native_interpreter import engine_python
from flexpiped.reload import load_files
from flexpiped.servers import listen_tcp, serving, serving_admin, url_of
from flexpiped.settings import Settings
from flexpiped.spans import spans_of
from flexpiped.starting_app import starting_app
from flexpiped.status import DaemonStatus, Health
from flexpiped.tls import LiveTls
from flexpiped.tracing import Handovers, traced
from flexpiped.watches import watch_hardware
from planner.layout import Pipeline

DRAIN_DEADLINE_S: Final = 30.0
TRACED: Final = frozenset({"/v1/completions", "/v1/chat/completions", *OWN_PATHS})


class Service:
    """The daemon's ports and what its model shares with nobody, around the one model that it serves.

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
        self.source = model_source(settings)
        self.name = served_name(settings, self.source)
        self.events = EventLog(on_publish=self._keep)
        self.failed = asyncio.Event()  # the engine is gone for good
        self.api_url = ""
        self._journal: Journal = journal_of(
            settings.journal, environment=os.environ, instance=str(admin_socket), on_failure=log_events.journal_failed
        )
        self._spans, self._handovers = spans_of(settings.tracing, model=self.name), Handovers()
        self._model = ModelService(
            settings,
            name=self.name,
            source=self.source,
            events=self.events,
            journal=self._journal,
            is_traced=self._spans is not None,
            on_progress=on_progress,
            on_given_up=lambda _reason: self.failed.set(),
        )

    @property
    def health(self) -> Health:
        """The state of the service: what the daemon is doing comes first, then what the engine is doing."""
        return self._model.health

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline in force, None before there is one."""
        return self._model.pipeline

    @property
    def max_stages(self) -> int:
        """How many stages the engine in force could have on the devices that are here."""
        return self._model.max_stages

    async def plan(self, stages: int | Auto) -> dict[str, Any]:
        """Return what the planner would do now, with every candidate; moves nothing.

        Raises:
            PlannerError, EngineError
        """
        return await self._model.plan(stages)

    def apply(self, settings: Settings, *, keys: KeyRing | None, tls: ssl.SSLContext | None) -> None:
        """Use what ``settings`` say of what is live, and the API keys and certificate that their files hold now.

        What is started later is started with them.
        """
        self._settings = settings
        self._keys = keys
        if self._tls is not None and tls is not None:
            self._tls.current = tls
        self._admission.limits = _limits(settings)
        self._model.use(settings)

    async def start(self, stack: AsyncExitStack) -> None:
        """Start everything; ``stack`` ends it. Returns when requests are served.

        Raises:
            PortTaken, AdminSocketError, EngineError, PlannerError
        """
        listener = listen_tcp(self._settings.http.host, self._settings.http.port)
        stack.callback(listener.close)
        self.api_url = f"{url_of(listener, is_tls=self._tls is not None)}/v1"
        await self._open_journal(stack)
        model = self._model
        hardware = Hardware(self._settings, python=engine_python(self._settings))
        status = model.status_source(api_url=self.api_url)
        feed = self._feed_dashboards(stack, status, hardware)
        pages = Dashboard(
            feed=feed,
            changes=model.changes,
            mode=lambda: self._settings.http.dashboard,
            keys=lambda: self._keys,
        ).routes()
        gate = await stack.enter_async_context(AsyncExitStack())
        first = starting_app(lambda: self.health, keys=lambda: self._keys, further=pages)
        await gate.enter_async_context(self._serving(first, listener, shutdown_s=1.0))
        await self._open_admin(stack, hardware, status)
        stack.push_async_callback(model.close)
        await model.start()
        app = create_app(
            self._backend(hardware),
            max_body_bytes=self._settings.http.max_body_bytes,
            further=pages,
            outermost=() if self._spans is None else (traced(self._spans, handovers=self._handovers, paths=TRACED),),
        )
        if self._spans is not None:
            stack.push_async_callback(asyncio.to_thread, self._spans.close)
        await stack.enter_async_context(self._serving(app, listener, shutdown_s=DRAIN_DEADLINE_S))
        feed.end_streams("it serves now")
        await gate.aclose()
        stack.push_async_callback(model.end_control)
        stack.callback(feed.close, "the daemon ends")
        stack.callback(self._begin_drain)
        model.begin(devices=hardware.devices)

    def _backend(self, hardware: Hardware) -> Backend:
        model = self._model
        return Backend(
            model=model.name,
            serving=model.serving,
            text=model.text,
            admission=self._admission,
            keys=lambda: self._keys,
            body_deadline_s=self._settings.http.body_deadline_s,
            metrics=model.metrics,
            health=lambda: model.health,
            devices=hardware.devices,
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

    def _feed_dashboards(self, stack: AsyncExitStack, status: DaemonStatus, hardware: Hardware) -> Feed:
        feed = Feed(
            Sources(
                status=status,
                tokens_per_s=lambda: status.tokens_per_s,
                load=self._model.load.observe,
                events=self.events,
                decisions=self._model.auto.decided,
                topology=hardware.look,
            )
        )
        self._run_beside(stack, feed.run_forever(), name="dashboard-feed")
        return feed

    async def _open_admin(self, stack: AsyncExitStack, hardware: Hardware, status: DaemonStatus) -> None:
        profiles = profile_routes(self._settings, source=self.source, environment=os.environ)
        app = admin_app(
            status=status,
            changes=self._model.changes,
            events=self.events,
            hardware=hardware,
            further=(
                *profiles.routes(),
                *history_routes(self._journal),
                *auto_routes(self._model.auto, events=self.events),
                *config_routes(self._configuration),
            ),
        )
        await stack.enter_async_context(serving_admin(app, self._admin_socket))
        stack.callback(self.events.close)
        stack.callback(self._model.auto.decided.close)
        self._run_beside(stack, watch_hardware(hardware, self.events), name="hardware-watch")
        self._run_beside(stack, status.sample_forever(), name="status-sampler")

    def _keep(self, event: Event) -> None:
        """Have the journal keep what happens; progress is only for those who watch."""
        self._handovers.note(event)
        intent = self._model.noted(event)
        if event.fields.get("state") != "progress":
            self._journal.record(event, intent)

    def _run_beside(self, stack: AsyncExitStack, work: Coroutine[None, None, None], *, name: str) -> None:
        run_beside(stack, work, name=name, on_failure=lambda said: self.events.publish(EventKind.DAEMON, said))

    def _begin_drain(self) -> None:
        reason = "streams in flight are finishing"
        self._model.begin_drain(reason)
        self.events.publish(EventKind.DAEMON, f"draining: {reason}")


def _limits(settings: Settings) -> AdmissionLimits:
    return AdmissionLimits(
        max_requests_in_flight=settings.admission.max_requests_in_flight,
        max_tokens_in_flight=settings.admission.max_tokens_in_flight,
        max_requests_queued=settings.admission.max_requests_queued,
        queue_deadline_s=settings.admission.queue_deadline_s,
    )
