"""Puts the parts of the daemon together, starts them in order and, when the scope ends, ends them in reverse.

sockets -> admin API and a port that says "starting" -> the first model -> HTTP API -> further models -> ready
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Final

from aiohttp import web

import flexpiped
from engines.parameters.keeper import ParameterKeeper
from flexpiped import log_events
from flexpiped.admin import admin_app
from flexpiped.admin_adapters import adapter_routes
from flexpiped.admin_auto import auto_routes
from flexpiped.admin_config import Configuration, config_routes
from flexpiped.admin_history import history_routes
from flexpiped.admin_models import ModelRoutes, PickedChanges, picked, running
from flexpiped.admission import Admission, AdmissionLimits
from flexpiped.api.app import create_app
from flexpiped.api.backend import Backend
from flexpiped.api.backends import Backends, Served
from flexpiped.api.forwarding import OWN_PATHS
from flexpiped.api.metrics import Metrics
from flexpiped.auto import DECISIONS_KEPT
from flexpiped.background import run_beside
from flexpiped.config_values import Auto
from flexpiped.connections import ConnectionLimits
from flexpiped.dashboard.feed import Feed, Sources
from flexpiped.dashboard.routes import Dashboard
from flexpiped.device_sharing import Held
from flexpiped.events import Event, EventKind, EventLog
from flexpiped.flexctl.text import plural
from flexpiped.hardware import Hardware, parameter_cache_bytes
from flexpiped.ingress.fleet import Fleet
from flexpiped.ingress.messages import Model
from flexpiped.ingress.opening import Live, ingresses, model_now
from flexpiped.journal import Journal, JournalError, journal_of
from flexpiped.keys import KeyRing
from flexpiped.load_monitor import LoadSampler
from flexpiped.loop_lag import LoopLag
from flexpiped.model_entry import Entry
from flexpiped.model_service import ModelService
from flexpiped.model_set import ModelSet
from flexpiped.model_settings import ModelSpec, specs_of
from flexpiped.models import model_source
from flexpiped.models_status import ModelsStatus
from flexpiped.native_interpreter import engine_python
from flexpiped.reload import load_files
from flexpiped.servers import listen_tcp, serving, serving_at, url_of
from flexpiped.settings import Settings
from flexpiped.spans import spans_of
from flexpiped.starting_app import starting_app
from flexpiped.status import Health, ServiceState
from flexpiped.survivors import Survivors
from flexpiped.tls import LiveTls
from flexpiped.tracing import Handovers, traced
from flexpiped.watches import watch_hardware
from planner.layout import Pipeline
from topology.measured import state_file

_LAST_WORDS_S: Final = 1.0  # of handlers, once the time to finish is over
_INGRESS_DEADLINE_S: Final = 30.0  # for their text processes; until then the daemon answers for them
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
        self._admission = Admission(limits=_limits(settings))
        self._admin_socket = admin_socket
        self.events = EventLog(on_publish=self._keep)
        self.failed = asyncio.Event()  # the engine is gone for good
        self.engines_may_stay = True  # once the daemon ends, where they are to outlive it
        self._is_ending = False
        self._broken = ""  # why it cannot go on, beside the models
        self._fleet: Fleet | None = None  # where others serve HTTP
        self._reloads = 0
        self.api_url = ""
        self._journal: Journal = journal_of(
            settings.journal, environment=os.environ, instance=str(admin_socket), on_failure=log_events.journal_failed
        )
        self._decisions = EventLog(capacity=DECISIONS_KEPT)  # of all models, for the dashboard
        self._handover_numbers, self._planning = count(1), asyncio.Lock()
        self._hardware: Hardware | None = None
        self._loop_lag = LoopLag()
        self._parameters = ParameterKeeper(
            parameter_cache_bytes(settings), on_refusal=lambda reason: log_events.parameters_not_kept(reason=reason)
        )
        self._models = ModelSet(
            specs_of(settings),
            make=self._made,
            serve=self._serve,
            journal=self._journal,
            events=self.events,
            on_progress=on_progress,
            on_all_given_up=lambda _reason: self.failed.set(),
        )
        self.name = ", ".join(self._models.entries)
        self.source = ", ".join(model_source(each.spec.settings) for each in self._models.entries.values())
        self._spans, self._handovers = spans_of(settings.tracing, model=self.name), Handovers()

    @property
    def health(self) -> Health:
        """The state of the service: ready when every model that should serve does."""
        return self._models.health if not self._broken else Health(state=ServiceState.FAILED, reason=self._broken)

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline in force of the first model, None before there is one."""
        return None if self._shown is None else self._shown.pipeline

    @property
    def max_stages(self) -> int:
        """How many stages the engine in force of the first model could have on the devices that are here."""
        return 1 if self._shown is None else self._shown.max_stages

    @property
    def named_first(self) -> str:
        """The name of the first model, where models are told apart by names; else nothing."""
        return self._models.first.name if self._models.are_named and self._models.first is not None else ""

    @property
    def models_in_words(self) -> str:
        """Return which models there are, and of how many stages each is."""
        return ", ".join(map(_in_words, self._models.entries.values()))

    @property
    def ports_in_words(self) -> str:
        """Return who serves HTTP, where that is not the daemon alone; else nothing."""
        if self._fleet is None:
            return ""
        count = self._fleet.num_listening
        return "1 ingress process" if count == 1 else f"{count} ingress processes"

    @property
    def _shown(self) -> ModelService | None:
        """What serves the model that is shown where only one can be."""
        return None if self._models.first is None else self._models.first.service

    async def plan(self, stages: int | Auto) -> dict[str, Any]:
        """Return what the planner would do now with the first model, with every candidate; moves nothing.

        Raises:
            PlannerError, EngineError
        """
        assert self._models.first is not None, "there is one at a start"
        return await running(self._models.first).plan(stages)

    def apply(self, settings: Settings, *, keys: KeyRing | None, tls: ssl.SSLContext | None) -> None:
        """Use what ``settings`` say of what is live, and the API keys and certificate that their files hold now.

        What is started later is started with them.
        """
        self._settings = settings
        self._keys = keys
        self._reloads += 1
        if self._tls is not None and tls is not None:
            self._tls.current = tls
        self._admission.limits = _limits(settings)
        for entry in self._models.entries.values():
            if entry.service is not None and not entry.configured.table and not settings.models:
                entry.service.use(replace(settings, models={}))
        self._models.changes.reconcile(specs_of(settings))
        if self._fleet is not None:
            self._fleet.push()

    async def start(self, stack: AsyncExitStack) -> None:
        """Start everything; ``stack`` ends it. Returns when requests are served.

        Raises:
            PortTaken, AdminSocketError, EngineError, PlannerError
        """
        http = self._settings.http
        listener = listen_tcp(http.host, http.port, is_shared=http.ingress_processes > 1)
        stack.callback(listener.close)
        self.api_url = f"{url_of(listener, is_tls=self._tls is not None)}/v1"
        await self._open_journal(stack)
        self._hardware = hardware = Hardware(self._settings, python=engine_python(self._settings))
        status = ModelsStatus(self._models, api_url=self.api_url)
        feed = self._feed_dashboards(stack, status, hardware)
        pages = Dashboard(
            feed=feed,
            changes=PickedChanges(self._first_or_picked),
            mode=lambda: self._settings.http.dashboard,
            keys=lambda: self._keys,
        ).routes()
        gate = await stack.enter_async_context(AsyncExitStack())
        first = starting_app(lambda: self.health, keys=lambda: self._keys, further=pages)
        await gate.enter_async_context(self._serving(first, listener, shutdown_s=1.0))
        await self._open_admin(stack, hardware, status)
        await stack.enter_async_context(self._parameters.serving())
        stack.push_async_callback(self._models.close)
        stack.callback(self._note_end)

        async def open_api() -> None:
            await self._open_api(stack, listener, hardware, pages)
            feed.end_streams("it serves now")
            if self._fleet is not None:
                listener.close()  # the gate's copy is the last: connections that come while it ends go to the others
            await gate.aclose()
            stack.push_async_callback(self._finish_requests)
            stack.push_async_callback(self._models.end_control)
            stack.callback(feed.close, "the daemon ends")
            stack.callback(self._begin_drain)

        await self._models.start_all(before_first=open_api)
        if self._fleet is not None:
            self._fleet.push()
            await self._fleet.until_serving(
                frozenset(each.name for each in self._models_now()), within_s=_INGRESS_DEADLINE_S
            )

    async def _open_api(
        self, stack: AsyncExitStack, listener: socket.socket, hardware: Hardware, pages: Sequence[web.RouteDef]
    ) -> None:
        backends = Backends(
            models=lambda: {
                name: Served(health=each.health, backend=each.backend, metrics=each.metrics)
                for name, each in self._models.entries.items()
            },
            are_named=lambda: self._models.are_named,
            health=lambda: self.health,
            admission=self._admission,
            keys=lambda: self._keys,
            devices=hardware.devices,
            parameters=lambda: self._parameters.figures,
            processes=lambda: [*self._loop_lag.families(), *(self._fleet.families() if self._fleet else ())],
            body_deadline_s=lambda: self._settings.http.body_deadline_s,
        )
        app = create_app(
            backends,
            max_body_bytes=self._settings.http.max_body_bytes,
            further=pages,
            outermost=() if self._spans is None else (traced(self._spans, handovers=self._handovers, paths=TRACED),),
        )
        if self._spans is not None:
            stack.push_async_callback(asyncio.to_thread, self._spans.close)
        if self._settings.http.ingress_processes == 1:
            await stack.enter_async_context(self._serving(app, listener, shutdown_s=_LAST_WORDS_S))
            return
        live = Live(
            settings=lambda: self._settings,
            keys=lambda: self._keys,
            models=self._models_now,
            are_named=lambda: self._models.are_named,
            reloads=lambda: self._reloads,
        )
        self._fleet = await stack.enter_async_context(
            ingresses(
                app,
                backends,
                live,
                listener=listener,
                socket=self._admin_socket.with_name(f"{self._admin_socket.name}.http"),
                last_words_s=_LAST_WORDS_S,
                on_news=lambda news: self.events.publish(EventKind.DAEMON, news),
                on_given_up=self._break,
            )
        )

    def _models_now(self) -> tuple[Model, ...]:
        """Return the models for which others than the daemon may answer."""
        found = (
            model_now(each.name, each.backend, each.service)
            for each in self._models.entries.values()
            if each.backend is not None and each.service is not None
        )
        return tuple(each for each in found if each is not None)

    def _break(self, reason: str) -> None:
        """Nobody can reach the models any more."""
        self._broken = reason
        self.failed.set()

    def _made(
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
            events=self.events.of_model(lambda: name if self._models.are_named else ""),
            journal=self._journal.of_model(spec.table),
            metrics=metrics,
            is_traced=self._spans is not None,
            parameters=self._parameters,
            held=held,
            numbers=self._handover_numbers,
            planning=self._planning,
            api_url=self.api_url,
            on_decision=lambda decision: self._note_decision(name, decision),
            on_progress=on_progress,
            on_given_up=on_given_up,
            survivors=self._survivors_of(name, spec.settings),
            is_name_taken=lambda wanted: self._is_taken(wanted, but=name),
        )

    def _is_taken(self, wanted: str, *, but: str) -> bool:
        """Whether requests that give a name mean a model, or an adapter of one that is not ``but``."""
        entries = self._models.entries
        others = (each for each in entries.values() if each.name != but)
        return wanted in entries or any(wanted in each.adapter_names for each in others)

    def _survivors_of(self, name: str, settings: Settings) -> Survivors:
        return Survivors(
            settings,
            name=name,
            served=lambda: frozenset(self._models.entries),
            may_stay=lambda: self._is_ending and self.engines_may_stay,
            admin_socket=self._admin_socket,
            state_folder=state_file(os.environ, home=Path.home()).parent,
            environment=os.environ,
            on_news=lambda news: self.events.publish(EventKind.ENGINE, news),
            parameters=self._parameters.address,
        )

    def _note_end(self) -> None:
        """It is the daemon that ends, and not a model that is stopped while it goes on."""
        self._is_ending = True

    def _serve(self, model: ModelService) -> Backend:
        assert self._hardware is not None, "known before any model starts"
        model.begin(devices=self._hardware.devices)
        return Backend(
            model=model.name,
            serving=model.serving,
            text=model.text,
            admission=self._admission,
            adapters=model.adapters,
            keys=lambda: self._keys,
            sampling_defaults=model.sampling_defaults,
            tool_calls=model.tool_calls,
            body_deadline_s=self._settings.http.body_deadline_s,
            metrics=model.metrics,
            health=lambda: model.health,
            devices=self._hardware.devices,
        )

    def _first_or_picked(self, request: web.Request) -> Entry:
        """The dashboard shows the first model where none is named."""
        first = self._models.first
        return first if first is not None and "model" not in request.query else picked(self._models, request)

    def _note_decision(self, name: str, decision: Event) -> None:
        named = {"model": name} if self._models.are_named else {}
        self._decisions.publish(decision.kind, decision.message, **decision.fields, **named)

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

    def _feed_dashboards(self, stack: AsyncExitStack, status: ModelsStatus, hardware: Hardware) -> Feed:
        nothing, entries = LoadSampler(), self._models.entries

        def service(name: str) -> ModelService | None:
            return entries[name].service if name in entries else None

        feed = Feed(
            Sources(
                status=status,
                models=lambda: tuple(self._models.entries),
                tokens_per_s=lambda name: None if (of := service(name)) is None else of.status.tokens_per_s,
                load=lambda name: (nothing if (of := service(name)) is None else of.load).observe(),
                events=self.events,
                decisions=self._decisions,
                topology=hardware.look,
            )
        )
        self._run_beside(stack, feed.run_forever(), name="dashboard-feed")
        return feed

    async def _open_admin(self, stack: AsyncExitStack, hardware: Hardware, status: ModelsStatus) -> None:
        models = self._models
        app = admin_app(
            status=status,
            changes=PickedChanges(lambda request: picked(models, request)),
            events=self.events,
            hardware=hardware,
            further=(
                *ModelRoutes(models, events=self.events).routes(),
                *history_routes(self._journal, tables=self._tables),
                *auto_routes(lambda request: running(picked(models, request)).auto, events=self.events),
                *adapter_routes(lambda request: running(picked(models, request)).adapters),
                *config_routes(self._configuration),
            ),
        )
        await stack.enter_async_context(serving_at(app, self._admin_socket))
        stack.callback(self.events.close)
        stack.callback(self._decisions.close)
        self._run_beside(stack, watch_hardware(hardware, self.events), name="hardware-watch")
        self._run_beside(stack, self._loop_lag.watch_forever(), name="loop-lag")

    def _tables(self) -> dict[str, str]:
        """Return the tables of models that are told apart, by their names."""
        entries = self._models.entries if self._models.are_named else {}
        return {name: each.configured.table for name, each in entries.items()}

    def _keep(self, event: Event) -> None:
        """Have the journal keep what happens; progress is only for those who watch."""
        self._handovers.note(event)
        entry = self._models.entries.get(event.fields.get("model", "")) or self._models.first
        service = None if entry is None else entry.service
        intent = None if service is None else service.noted(event)
        if event.fields.get("state") != "progress":
            journal = self._journal if entry is None else self._journal.of_model(entry.configured.table)
            journal.record(event, intent)

    def _run_beside(self, stack: AsyncExitStack, work: Coroutine[None, None, None], *, name: str) -> None:
        run_beside(stack, work, name=name, on_failure=lambda said: self.events.publish(EventKind.DAEMON, said))

    async def _finish_requests(self) -> None:
        """Let those under way finish, as long as that may take. The port stays open: it says why it takes no others."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.http.drain_deadline_s):
                await self._models.idle()

    def _begin_drain(self) -> None:
        reason = "streams in flight are finishing"
        self._models.begin_drain(reason)
        self.events.publish(EventKind.DAEMON, f"draining: {reason}")


def _in_words(entry: Entry) -> str:
    pipeline = None if entry.service is None else entry.service.pipeline
    stages = 0 if pipeline is None else pipeline.granularity
    return f"{entry.name} ({plural(stages, 'stage') if stages else entry.health.state.value})"


def _limits(settings: Settings) -> AdmissionLimits:
    return AdmissionLimits(
        max_requests_in_flight=settings.admission.max_requests_in_flight,
        max_tokens_in_flight=settings.admission.max_tokens_in_flight,
        max_requests_queued=settings.admission.max_requests_queued,
        queue_deadline_s=settings.admission.queue_deadline_s,
    )
