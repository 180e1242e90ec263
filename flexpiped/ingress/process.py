"""An ingress process: ``python -m flexpiped.ingress.process FD PARENT_PID``, with a Unix socket inherited as FD.

It listens at the address that the daemon names, which others share (SO_REUSEPORT), and ends with the daemon. SIGTERM,
or the daemon's word, lets its requests finish and ends it; SIGINT and SIGHUP, which a terminal sends to all, are the
daemon's business.
"""

import asyncio
import signal
import socket
import sys
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Final

import uvloop

from engines.process import die_with_parent
from flexpiped import log_events
from flexpiped.api.backends import Backends
from flexpiped.connections import ConnectionLimits
from flexpiped.ingress.app import ingress_app
from flexpiped.ingress.channel import Channel, up_channel
from flexpiped.ingress.here import Here
from flexpiped.ingress.link import Link
from flexpiped.ingress.messages import (
    Boarded,
    Chunk,
    Done,
    Down,
    Drain,
    Now,
    Ping,
    Pong,
    Refused,
    Serves,
    Tokens,
    Up,
    Welcome,
)
from flexpiped.ingress.relay import Relay
from flexpiped.ingress.remote import RemoteAdmission, RemoteMetrics
from flexpiped.keys import KeyRing
from flexpiped.log import configure_logging
from flexpiped.long_lived import settle
from flexpiped.servers import listen_shared, serving
from flexpiped.settings import LogFormat, LogLevel, LogSettings
from flexpiped.status import Health, ServiceState
from flexpiped.tls import LiveTls, TlsError, load_tls

_NOBODY: Final = ""


class Ingress:
    """One life of it."""

    def __init__(self) -> None:
        self._channel: Channel[Up, Down] = up_channel(self._on_message)
        self._link = Link(self._channel.send)
        self._now: Now | None = None
        self._here = Here(self._link, keys=self._keys, on_change=self._tell_models)
        self._tls: LiveTls | None = None
        self._welcome: Welcome | None = None
        self._started: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()  # it knows all that it is
        self._is_listening = False
        self._to_end = asyncio.Event()

    async def live(self, connection: socket.socket) -> None:
        """Serve until the daemon is gone or wants no more. Raises: TlsError, PortTaken, ConnectionError."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._to_end.set)
        connection.setblocking(False)
        await loop.create_unix_connection(lambda: self._channel, sock=connection)
        self._channel.lost.add_done_callback(lambda _: self._lose())
        welcome = await self._started
        self._load_tls()
        async with AsyncExitStack() as stack:
            stack.callback(self._channel.close)
            stack.push_async_callback(self._here.close)
            await self._here.settled()
            await stack.enter_async_context(self._serving(welcome))
            self._is_listening = True
            self._tell_models(tuple(self._here.models()))
            await self._to_end.wait()

    def _serving(self, welcome: Welcome) -> AbstractAsyncContextManager[None]:
        backends = Backends(
            models=self._here.models,
            are_named=lambda: self._now is not None and self._now.are_named,
            health=lambda: Health(state=ServiceState.READY, reason=""),
            admission=RemoteAdmission(self._link, model=_NOBODY, serial=0),
            keys=self._keys,
            body_deadline_s=lambda: welcome.body_deadline_s,
            unnamed=RemoteMetrics(self._link, model=_NOBODY),
        )
        return serving(
            ingress_app(
                backends, relay=Relay(Path(welcome.daemon_socket)).passed_on, max_body_bytes=welcome.max_body_bytes
            ),
            listen_shared(welcome.family, tuple(welcome.address)),
            shutdown_s=welcome.drain_deadline_s,
            limits=ConnectionLimits(
                header_deadline_s=welcome.header_deadline_s,
                max_header_line_bytes=welcome.max_header_line_bytes,
                send_deadline_s=welcome.send_deadline_s,
            ),
            tls=None if self._tls is None else self._tls.front,
        )

    def _keys(self) -> KeyRing | None:
        return None if self._now is None else self._now.keys

    def _on_message(self, message: Down) -> None:
        match message:
            case Done() | Boarded() | Refused() | Tokens() | Chunk():
                self._link.take(message)
            case Now():
                self._use(message)
            case Welcome():
                self._welcome = message
            case Ping():
                self._channel.send(Pong())
            case Drain():
                self._to_end.set()

    def _use(self, now: Now) -> None:
        before, self._now = self._now, now
        if before is None or (before.log_format, before.log_level) != (now.log_format, now.log_level):
            configure_logging(LogSettings(format=LogFormat(now.log_format), level=LogLevel(now.log_level)))
        self._here.use(now.models)
        if before is None:
            assert self._welcome is not None, "it comes first"
            settle()
            self._started.set_result(self._welcome)
        elif before.reloads != now.reloads and self._tls is not None:
            try:
                self._load_tls()
            except TlsError as error:  # the daemon could read them a moment ago
                log_events.config_rejected(file=str(now.tls_certificate), problems=[str(error)])

    def _load_tls(self) -> None:
        """Read certificate and key. Raises: TlsError; then those before stay in force."""
        assert self._now is not None, "it has started"
        certificate, key = (
            None if each is None else Path(each) for each in (self._now.tls_certificate, self._now.tls_key)
        )
        context = load_tls(certificate, key)
        if context is not None:
            self._tls = self._tls or LiveTls(context)
            self._tls.current = context

    def _tell_models(self, names: tuple[str, ...]) -> None:
        if self._is_listening:
            self._channel.send(Serves(names))

    def _lose(self) -> None:
        reason = self._channel.lost.result()
        self._link.lose(reason)
        self._to_end.set()
        if not self._started.done():
            self._started.set_exception(ConnectionError(reason))


def main() -> None:
    fd, parent_pid = map(int, sys.argv[1:])
    die_with_parent(parent_pid=parent_pid)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    async def live() -> None:
        await Ingress().live(socket.socket(fileno=fd))

    uvloop.run(live())


if __name__ == "__main__":
    main()
