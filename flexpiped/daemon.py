"""The daemon's life: start, serve, reload, drain, end. torch and transformers are never imported in this process.

Exit codes: 0 stopped as asked, 1 could not start or the engine failed for good, 2 wrong configuration or usage.
"""

import asyncio
import os
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

import flexpiped
from engines.errors import EngineError
from flexpiped import log_events
from flexpiped.admin_config import Configuration
from flexpiped.admin_socket import AdminSocketError, candidate_sockets, default_socket
from flexpiped.banner import QUIET_START_S, Banner, flexctl_command
from flexpiped.events import EventKind
from flexpiped.hardware import devices_in_words
from flexpiped.ingress.fleet import IngressFailed
from flexpiped.keys import KeyFileError
from flexpiped.log import configure_logging
from flexpiped.long_lived import settle
from flexpiped.models import NoDemoModel, for_people
from flexpiped.notify import Notifier
from flexpiped.reload import ReloadReport, compare
from flexpiped.servers import PortTaken
from flexpiped.service import Service
from flexpiped.settings import Settings
from flexpiped.signals import Signals
from flexpiped.spans import TracingUnavailable
from flexpiped.tls import TlsError
from planner.errors import PlannerError
from topology.units import plural

_END_S = 30.0  # that engines and files take besides
_START_ERRORS = (
    PortTaken,
    AdminSocketError,
    IngressFailed,
    NoDemoModel,
    KeyFileError,
    TlsError,
    TracingUnavailable,
    EngineError,
    PlannerError,
)


def run(settings: Settings, *, config_file: Path | None, environment: Mapping[str, str]) -> int:
    """Run the daemon until it is asked to stop, and return its exit code."""
    configure_logging(settings.log)
    admin_socket = settings.admin.socket or default_socket(environment, uid=os.getuid())
    is_found = admin_socket in candidate_sockets(environment, uid=os.getuid())
    command = flexctl_command(
        Path(sys.argv[0]).absolute(), folder=Path.cwd(), socket=None if is_found else admin_socket
    )
    banner = Banner(None if environment.get("NOTIFY_SOCKET") else sys.stdout, command=command)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        signals = Signals()
        signals.install(runner.get_loop())
        daemon = Daemon(
            settings,
            config_file=config_file,
            admin_socket=admin_socket,
            signals=signals,
            banner=banner,
            notifier=Notifier(environment),
        )
        return runner.run(_live(daemon, signals))


async def _live(daemon: "Daemon", signals: Signals) -> int:
    """Let the daemon live; the second signal cancels it wherever it is."""
    living = asyncio.create_task(daemon.live(), name="daemon")
    hurry = asyncio.create_task(signals.stop_now.wait(), name="second-signal")
    await asyncio.wait([living, hurry], return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if not living.done():
        living.cancel()
        await asyncio.wait([living])
    return 1 if living.cancelled() else living.result()


class Daemon:
    """One run of the daemon."""

    def __init__(
        self,
        settings: Settings,
        *,
        config_file: Path | None,
        admin_socket: Path,
        signals: Signals,
        banner: Banner,
        notifier: Notifier,
    ) -> None:
        self._settings = settings
        self._config_file = config_file
        self._admin_socket = admin_socket
        self._signals = signals
        self._banner = banner
        self._notifier = notifier
        self._is_announced = False  # from ready to stop: when a service manager may be told of a reload

    async def live(self) -> int:
        """Start, serve until asked to stop, drain. Return the exit code."""
        watched = asyncio.create_task(self._notifier.feed_watchdog(), name="watchdog")
        try:
            return await self._live()
        finally:
            watched.cancel()

    async def _live(self) -> int:
        try:
            service = Service(
                self._settings,
                admin_socket=self._admin_socket,
                on_progress=self._progress,
                configuration=Configuration(
                    settings=lambda: self._settings,
                    compare=self._compared,
                    reload=lambda: self._reload(service),
                ),
            )
            self._announce_start(service)
            async with AsyncExitStack() as stack:
                if not await self._start(service, stack):
                    return 0
                settle()
                self._announce_ready(service)
                await self._serve(service)
                self._announce_stop(service)
        except _START_ERRORS as error:
            self._report_failure(str(error))
            return 1
        if not self._banner.is_read_live:
            log_events.daemon_stopped(up_s=self._banner.elapsed_s)
        return 1 if service.failed.is_set() else 0

    async def _start(self, service: Service, stack: AsyncExitStack) -> bool:
        """Return True once requests are served, False when asked to stop before that."""
        showing = asyncio.get_running_loop().call_later(QUIET_START_S, self._banner.show_progress)
        starting = asyncio.create_task(service.start(stack), name="start")
        stopping = asyncio.create_task(self._signals.stop.wait(), name="stop-while-starting")
        try:
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                return True
            return False
        finally:
            showing.cancel()
            starting.cancel()
            stopping.cancel()
            await asyncio.wait([starting, stopping])

    async def _serve(self, service: Service) -> None:
        """Return when asked to stop, or when the engine has failed for good."""
        while True:
            flags = (self._signals.stop, self._signals.reload, service.failed)
            waiting = [asyncio.create_task(flag.wait()) for flag in flags]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waiting:
                    task.cancel()
            if self._signals.stop.is_set() or service.failed.is_set():
                return
            self._signals.reload.clear()
            self._reload(service)

    def _reload(self, service: Service) -> ReloadReport:
        """Read the configuration again, as SIGHUP and ``POST /reload`` ask.

        While it starts or drains no service manager is told: ``READY=1``, which ends a reload, would end that too.
        """
        if self._is_announced:
            self._notifier.reloading(monotonic_us=time.monotonic_ns() // 1000)
        report = self._compared()
        if report.file and not report.problems:
            service.apply(report.settings, keys=report.keys, tls=report.tls)
            configure_logging(report.settings.log)
            self._settings = report.settings
        self._log_reload(report)
        service.events.publish(EventKind.DAEMON, report.message, reload=report.to_wire())
        if self._is_announced:
            self._notifier.ready(f"serving {_facts(service)}; {report.message}")
        return report

    def _compared(self) -> ReloadReport:
        """Say what a reload would do."""
        return compare(self._settings, self._config_file)

    def _log_reload(self, report: ReloadReport) -> None:
        if report.problems:
            log_events.config_rejected(file=report.file, problems=report.problems)
        elif not report.changes:
            log_events.config_unchanged(file=report.file)
        if applied := report.names(live=True):
            log_events.config_applied(file=report.file, keys=applied)
        if waiting := report.names(live=False):
            log_events.config_needs_restart(file=report.file, keys=waiting)

    def _progress(self, message: str) -> None:
        self._banner.progress(message)
        self._notifier.status(f"starting: {message}")

    def _announce_start(self, service: Service) -> None:
        version, engine = flexpiped.__version__, self._settings.engine.value
        devices = devices_in_words(self._settings)
        self._banner.starting(version=version, engine=engine, devices=devices, model=for_people(service.source))
        if not self._banner.is_read_live:
            log_events.daemon_starting(version=version, model=service.source, engine=engine)

    def _announce_ready(self, service: Service) -> None:
        took_s, facts = self._banner.elapsed_s, _facts(service)
        self._banner.ready(
            facts=facts,
            api_url=service.api_url,
            admin=self._admin_socket,
            next_stages=self._next_stages(service),
            model=service.models.named_first,
        )
        self._notifier.ready(f"serving {facts}")
        self._is_announced = True
        service.events.publish(EventKind.DAEMON, f"ready: {facts}")
        if not self._banner.is_read_live:
            log_events.daemon_ready(start_s=took_s, http=service.api_url, admin=str(self._admin_socket))

    def _announce_stop(self, service: Service) -> None:
        reason = service.health.reason if service.failed.is_set() else f"stopping on {self._signals.stopped_by}"
        service.engines_may_stay = self._signals.stopped_by != "SIGINT"
        deadline_s = self._settings.http.drain_deadline_s
        self._banner.say(f"{reason}; streams in flight have {deadline_s:g} s to finish (again: stop at once)")
        self._is_announced = False
        self._notifier.stopping(reason, within_s=deadline_s + _END_S)
        if not self._banner.is_read_live:
            log_events.daemon_draining(reason=reason, deadline_s=deadline_s)

    def _report_failure(self, reason: str) -> None:
        self._notifier.stopping(f"start failed: {reason}")
        if self._banner.is_read_live:
            print(f"flexpiped: {reason}", file=sys.stderr)
        else:
            log_events.daemon_start_failed(reason=reason)

    def _next_stages(self, service: Service) -> int:
        """Return a number of stages worth trying next."""
        if service.models.pipeline is None:
            return 1
        twice, decoders = 2 * service.models.pipeline.granularity, service.models.pipeline.num_decoders
        return min(twice, decoders, service.models.max_stages)


def _facts(service: Service) -> str:
    facts = _facts_of_models(service)
    return f"{facts}, {service.ports_in_words}" if service.ports_in_words else facts


def _facts_of_models(service: Service) -> str:
    if service.models.named_first:
        return service.models.in_words
    if service.models.pipeline is None:
        return service.name
    stages, decoders = service.models.pipeline.granularity, service.models.pipeline.num_decoders
    return f"{service.name}, {decoders} decoder layers in {plural(stages, 'stage')}"
