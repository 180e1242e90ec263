"""An ingress in the process of the test, before an application under test: both ends of a real socket, on one loop."""

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from engines.protocol import EngineCapabilities
from engines.text.local import LocalText, PlainTokenizer
from flexpiped.api.backend import Backend
from flexpiped.api.backends import BACKENDS, Backends, Served
from flexpiped.connections import ConnectionLimits
from flexpiped.ingress.app import ingress_app
from flexpiped.ingress.channel import Channel, down_channel, up_channel
from flexpiped.ingress.desk import Desk
from flexpiped.ingress.link import Link
from flexpiped.ingress.messages import Boarded, Chunk, Done, Down, Refused, Tokens, Up
from flexpiped.ingress.relay import Relay
from flexpiped.ingress.remote import RemoteAdmission, RemoteMetrics, RemoteServing
from flexpiped.servers import listen_tcp, serving, serving_at, url_of
from flexpiped.status import Health, ServiceState
from tests.support.http_app import HttpApp
from tests.support.tiny_tokenizer import byte_level_tokenizer

C = TypeVar("C", bound=asyncio.Protocol)


@dataclass(kw_only=True)
class InFront:
    """An ingress under test; ``kill`` ends its connection with the daemon, as its death does."""

    url: str
    desk: Desk
    link: Link
    text: LocalText
    kill: Callable[[], None]
    app: HttpApp

    async def is_idle(self) -> bool:
        """Nothing of any request is left, at either end."""
        return (self.desk.num_open, self.link.num_open, self.text.num_open) == (0, 0, 0) and await self.app.is_idle()


@asynccontextmanager
async def in_front_of(
    app: HttpApp,
    *,
    max_body_bytes: int = 1 << 20,
    serial: int | None = None,
    send_deadline_s: float = math.inf,
    send_buffer_bytes: int | None = None,
) -> AsyncIterator[InFront]:
    """Serve on 127.0.0.1 before ``app`` while the scope lasts, as an ingress process does.

    Args:
        serial: Of the backend that it knows; by default that of ``app``.
        send_buffer_bytes: The kernel's, of each connection.
    """
    ours, theirs = socket.socketpair()
    behind = app.app[BACKENDS]
    text = LocalText(PlainTokenizer(byte_level_tokenizer()))

    def from_daemon(message: Down) -> None:
        if isinstance(message, Done | Boarded | Refused | Tokens | Chunk):
            link.take(message)

    up = await _joined(theirs, up_channel(from_daemon))
    link = Link(up.send)
    up.lost.add_done_callback(lambda lost: link.lose(lost.result()))
    down: Channel[Down, Up]
    desk = Desk(behind, send=lambda message: down.send(message))
    down = await _joined(ours, down_channel(desk.take))
    with TemporaryDirectory(prefix="flexpiped-") as folder:
        daemon = Path(folder) / "daemon.http"
        known = app.backend if serial is None else replace(app.backend, serial=serial)
        backends = _remote(known, behind, link, text)
        front = ingress_app(backends, relay=Relay(daemon).passed_on, max_body_bytes=max_body_bytes)
        listener = listen_tcp("127.0.0.1", 0)
        if send_buffer_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        limits = ConnectionLimits(send_deadline_s=send_deadline_s)
        try:
            async with serving_at(app.app, daemon), serving(front, listener, shutdown_s=1.0, limits=limits):
                yield InFront(url=url_of(listener), desk=desk, link=link, text=text, kill=up.close, app=app)
        finally:
            up.close()
            down.close()
            await asyncio.wait([up.lost, down.lost])
            await desk.close()


async def _joined(end: socket.socket, channel: C) -> C:
    end.setblocking(False)
    await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=end)
    return channel


def _remote(backend: Backend, behind: Backends, link: Link, text: LocalText) -> Backends:
    """Return what an ingress has in place of these backends."""
    model, ready = backend.model, Health(state=ServiceState.READY, reason="")

    def capabilities() -> EngineCapabilities:
        now = backend.serving.capabilities
        assert now is not None, "it serves"
        return now

    metrics = RemoteMetrics(link, model=model)
    remote = replace(
        backend,
        serving=RemoteServing(link, model=model, serial=backend.serial, capabilities=capabilities),
        text=text,
        admission=RemoteAdmission(link, model=model, serial=backend.serial),
        metrics=metrics,
        health=lambda: ready,
    )
    return replace(
        behind,
        models=lambda: {model: Served(health=ready, backend=remote, metrics=metrics)},
        admission=RemoteAdmission(link, model="", serial=0),
        unnamed=RemoteMetrics(link, model=""),
    )
