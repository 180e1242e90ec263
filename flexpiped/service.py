"""Puts the parts of the daemon together, starts them in order and, when the scope ends, ends them in reverse.

sockets -> admin API and a port that says "starting" -> the first model -> HTTP API -> further models -> ready
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Final

from aiohttp import web

import flexpiped
from engines.parameters.keeper import ParameterKeeper
from flexpiped import log_events
from flexpiped.admin_config import Configuration
from flexpiped.admin_models import PickedChanges, running
from flexpiped.admin_parts import admin_of
from flexpiped.admission import Admission, limits_of
from flexpiped.api.app import create_app
from flexpiped.api.forwarding import OWN_PATHS
from flexpiped.auto import DECISIONS_KEPT
from flexpiped.background import run_beside
from flexpiped.config_values import Auto
from flexpiped.dashboard.feed import Feed
from flexpiped.dashboard.model_sources import first_or_picked, sources_of
from flexpiped.dashboard.routes import Dashboard
from flexpiped.events import Event, EventKind, EventLog
from flexpiped.hardware import Hardware, parameter_cache_bytes
from flexpiped.http_port import HttpPort
from flexpiped.journal import Journal, JournalError, journal_of
from flexpiped.keys import KeyRing
from flexpiped.loop_lag import LoopLag
from flexpiped.model_set import ModelSet
from flexpiped.model_settings import specs_of
from flexpiped.models import model_source
from flexpiped.models_status import ModelsStatus
from flexpiped.native_interpreter import engine_python
from flexpiped.reload import load_files
from flexpiped.servers import listen_tcp, serving_at
from flexpiped.settings import Settings
from flexpiped.shared_parts import SharedParts
from flexpiped.spans import spans_of
from flexpiped.status import Health, ServiceState
from flexpiped.tls import LiveTls
from flexpiped.tracing import Handovers, traced
from flexpiped.watches import watch_hardware
from topology.device import Device

TRACED: Final = frozenset({"/v1/completions", "/v1/chat/completions", *OWN_PATHS})


class Service:
    """The daemon: its ports, and what the models that it serves (``flexpiped.model_set``) share.

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
        self._admission = Admission(limits=limits_of(settings.admission))
        self._admin_socket = admin_socket
        self.events = EventLog(on_publish=self._keep)
        self.failed = asyncio.Event()  # the engine is gone for good
        self.engines_may_stay = True  # once the daemon ends, where they are to outlive it
        self._is_ending = False
        self._broken = ""  # why it cannot go on, beside the models
        self._port: HttpPort | None = None
        self._reloads = 0
        self.api_url = ""
        self._journal: Journal = journal_of(
            settings.journal, environment=os.environ, instance=str(admin_socket), on_failure=log_events.journal_failed
        )
        self._decisions = EventLog(capacity=DECISIONS_KEPT)  # of all models, for the dashboard
        self._hardware: Hardware | None = None
        self._loop_lag = LoopLag()
        self._parameters = ParameterKeeper(
            parameter_cache_bytes(settings), on_refusal=lambda reason: log_events.parameters_not_kept(reason=reason)
        )
        self._shared = SharedParts(
            models=lambda: self.models,
            settings=lambda: self._settings,
            keys=lambda: self._keys,
            api_url=lambda: self.api_url,
            devices=self._devices,
            may_stay=lambda: self._is_ending and self.engines_may_stay,
            admin_socket=admin_socket,
            admission=self._admission,
            parameters=self._parameters,
            journal=self._journal,
            events=self.events,
            decisions=self._decisions,
            numbers=count(1),
            planning=asyncio.Lock(),
            is_traced=settings.tracing.otlp_endpoint is not None,
        )
        self.models = ModelSet(
            specs_of(settings),
            make=self._shared.model_service,
            serve=self._shared.serve,
            journal=self._journal,
            events=self.events,
            on_progress=on_progress,
            on_all_given_up=lambda _reason: self.failed.set(),
        )
        self.name = ", ".join(self.models.entries)
        self.source = ", ".join(model_source(each.spec.settings) for each in self.models.entries.values())
        self._spans, self._handovers = spans_of(settings.tracing, model=self.name), Handovers()

    @property
    def health(self) -> Health:
        """The state of the service: ready when every model that should serve does."""
        return self.models.health if not self._broken else Health(state=ServiceState.FAILED, reason=self._broken)

    @property
    def ports_in_words(self) -> str:
        """Return who serves HTTP, where that is not the daemon alone; else nothing."""
        return "" if self._port is None else self._port.in_words

    async def plan(self, stages: int | Auto) -> dict[str, Any]:
        """Return what the planner would do now with the first model, with every candidate; moves nothing.

        Raises:
            PlannerError, EngineError
        """
        assert self.models.first is not None, "there is one at a start"
        return await running(self.models.first).plan(stages)

    def apply(self, settings: Settings, *, keys: KeyRing | None, tls: ssl.SSLContext | None) -> None:
        """Use what ``settings`` say of what is live, and the API keys and certificate that their files hold now.

        What is started later is started with them.
        """
        self._settings = settings
        self._keys = keys
        self._reloads += 1
        if self._tls is not None and tls is not None:
            self._tls.current = tls
        self._admission.limits = limits_of(settings.admission)
        for entry in self.models.entries.values():
            if entry.service is not None and not entry.configured.table and not settings.models:
                entry.service.use(replace(settings, models={}))
        self.models.changes.reconcile(specs_of(settings))
        if self._port is not None:
            self._port.push()

    async def start(self, stack: AsyncExitStack) -> None:
        """Start everything; ``stack`` ends it. Returns when requests are served.

        Raises:
            PortTaken, AdminSocketError, EngineError, PlannerError
        """
        http = self._settings.http
        listener = listen_tcp(http.host, http.port, is_shared=http.ingress_processes > 1)
        stack.callback(listener.close)
        self._port = port = self._port_of(listener)
        self.api_url = port.api_url
        await self._open_journal(stack)
        self._hardware = hardware = Hardware(self._settings, python=engine_python(self._settings))
        status = ModelsStatus(self.models, api_url=self.api_url)
        feed = self._feed_dashboards(stack, status, hardware)
        pages = Dashboard(
            feed=feed,
            changes=PickedChanges(lambda request: first_or_picked(self.models, request)),
            mode=lambda: self._settings.http.dashboard,
            keys=lambda: self._keys,
        ).routes()
        await port.begin(stack, pages)
        await self._open_admin(stack, hardware, status)
        await stack.enter_async_context(self._parameters.serving())
        stack.push_async_callback(self.models.close)
        stack.callback(self._note_end)

        async def open_api() -> None:
            await self._open_api(stack, port, pages)
            feed.end_streams("it serves now")
            await port.end_gate()
            stack.push_async_callback(self._finish_requests)
            stack.push_async_callback(self.models.end_control)
            stack.callback(feed.close, "the daemon ends")
            stack.callback(self._begin_drain)

        await self.models.start_all(before_first=open_api)
        await port.until_serving()

    def _port_of(self, listener: socket.socket) -> HttpPort:
        return HttpPort(
            listener,
            ingress_socket=self._admin_socket.with_name(f"{self._admin_socket.name}.http"),
            shared=self._shared,
            health=lambda: self.health,
            reloads=lambda: self._reloads,
            tls=None if self._tls is None else self._tls.front,
            on_news=lambda news: self.events.publish(EventKind.DAEMON, news),
            on_given_up=self._break,
        )

    async def _open_api(self, stack: AsyncExitStack, port: HttpPort, pages: Sequence[web.RouteDef]) -> None:
        backends = self._shared.backends(
            health=lambda: self.health,
            processes=lambda: [*self._loop_lag.families(), *port.families()],
        )
        app = create_app(
            backends,
            max_body_bytes=self._settings.http.max_body_bytes,
            further=pages,
            outermost=() if self._spans is None else (traced(self._spans, handovers=self._handovers, paths=TRACED),),
        )
        if self._spans is not None:
            stack.push_async_callback(asyncio.to_thread, self._spans.close)
        await port.open_api(stack, app, backends)

    def _break(self, reason: str) -> None:
        """Nobody can reach the models any more."""
        self._broken = reason
        self.failed.set()

    def _note_end(self) -> None:
        """It is the daemon that ends, and not a model that is stopped while it goes on."""
        self._is_ending = True

    def _devices(self) -> tuple[Device, ...]:
        assert self._hardware is not None, "known before any model starts"
        return self._hardware.devices()

    async def _open_journal(self, stack: AsyncExitStack) -> None:
        """Open it; where that cannot be, the daemon serves without, and says so."""
        stack.push_async_callback(asyncio.to_thread, self._journal.close)
        try:
            await asyncio.to_thread(self._journal.open)
        except JournalError as error:
            log_events.journal_failed(reason=str(error))
            self.events.publish(EventKind.DAEMON, f"journal failed: {error}")
        self.events.publish(EventKind.DAEMON, f"starting flexpiped {flexpiped.__version__} with {self.source}")

    def _feed_dashboards(self, stack: AsyncExitStack, status: ModelsStatus, hardware: Hardware) -> Feed:
        sources = sources_of(
            self.models, status=status, events=self.events, decisions=self._decisions, topology=hardware.look
        )
        feed = Feed(sources)
        self._run_beside(stack, feed.run_forever(), name="dashboard-feed")
        return feed

    async def _open_admin(self, stack: AsyncExitStack, hardware: Hardware, status: ModelsStatus) -> None:
        app = admin_of(
            self.models,
            status=status,
            hardware=hardware,
            events=self.events,
            journal=self._journal,
            configuration=self._configuration,
        )
        await stack.enter_async_context(serving_at(app, self._admin_socket))
        stack.callback(self.events.close)
        stack.callback(self._decisions.close)
        self._run_beside(stack, watch_hardware(hardware, self.events), name="hardware-watch")
        self._run_beside(stack, self._loop_lag.watch_forever(), name="loop-lag")

    def _keep(self, event: Event) -> None:
        self._handovers.note(event)
        self.models.record(event)

    def _run_beside(self, stack: AsyncExitStack, work: Coroutine[None, None, None], *, name: str) -> None:
        run_beside(stack, work, name=name, on_failure=lambda said: self.events.publish(EventKind.DAEMON, said))

    async def _finish_requests(self) -> None:
        """Let those under way finish, as long as that may take. The port stays open: it says why it takes no others."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.http.drain_deadline_s):
                await self.models.idle()

    def _begin_drain(self) -> None:
        reason = "streams in flight are finishing"
        self.models.begin_drain(reason)
        self.events.publish(EventKind.DAEMON, f"draining: {reason}")
