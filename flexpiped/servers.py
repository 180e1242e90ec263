"""Listening sockets and the applications behind them."""

import errno
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from flexpiped.admin_socket import SOCKET_MODE, inode_of, release_socket, take_socket
from flexpiped.connections import ConnectionLimits, Runner

_BACKLOG = 1024


class PortTaken(Exception):
    """The address of the HTTP API cannot be had; the message says why and what to do."""


def listen_tcp(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """Return a listening socket; port 0 takes any free one.

    Args:
        is_shared: Other processes of this user may listen at the same address, too (``listen_shared``). Whoever has it
            already, another daemon that shares it for instance, has it alone all the same.

    Raises:
        PortTaken
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise PortTaken(f"http.host {host}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            with socket.socket(family, kind, protocol) as alone:
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind(address)
                alone.listen(1)
                address = alone.getsockname()  # port 0 would take one that others of this user share
            _share(listener)
        _listen(listener, address)
    except OSError as error:
        listener.close()
        key = "http.host" if error.errno == errno.EADDRNOTAVAIL else "http.port"  # no address of this host, or taken
        raise PortTaken(f"cannot listen on {host}:{port}: {error.strerror}. Choose another {key}.") from None
    return listener


def hold_address(listener: socket.socket) -> socket.socket:
    """Return a socket that keeps the address of a shared listener for this user without listening there."""
    holder = socket.socket(listener.family, listener.type, listener.proto)
    _share(holder)
    holder.bind(listener.getsockname())
    return holder


def listen_shared(family: int, address: tuple[Any, ...]) -> socket.socket:
    """Return one more listening socket at an address that ``listen_tcp`` has made shared.

    Raises:
        PortTaken
    """
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        _share(listener)
        _listen(listener, address)
    except OSError as error:
        listener.close()
        raise PortTaken(f"cannot listen on {address[0]}:{address[1]}: {error.strerror}") from None
    return listener


def _share(made: socket.socket) -> None:
    """Let sockets of this user have the same address, before it is bound."""
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        made.setsockopt(socket.SOL_SOCKET, option, 1)


def _listen(listener: socket.socket, address: tuple[Any, ...]) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # Linux: so has every connection that is accepted
    listener.bind(address)
    listener.listen(_BACKLOG)
    listener.setblocking(False)


def url_of(listener: socket.socket, *, is_tls: bool = False) -> str:
    """Return the base URL of a listening TCP socket."""
    return base_url(*listener.getsockname()[:2], is_tls=is_tls)


def base_url(host: str, port: int, *, is_tls: bool = False) -> str:
    """Return the URL of an address; an IPv6 address is bracketed."""
    scheme = "https" if is_tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@asynccontextmanager
async def serving(
    app: web.Application,
    listener: socket.socket,
    *,
    shutdown_s: float,
    limits: ConnectionLimits = ConnectionLimits(),
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[None]:
    """Serve ``app`` on ``listener`` while the scope lasts; handlers get ``shutdown_s`` to end by themselves.

    A client that leaves cancels its handler: that is how a request in flight is freed.
    """
    runner = Runner(app, limits=limits, shutdown_s=shutdown_s)
    await runner.setup()
    try:
        await web.SockSite(runner, listener, backlog=_BACKLOG, ssl_context=tls).start()
        yield
    finally:
        await runner.cleanup()
        listener.close()


@asynccontextmanager
async def serving_at(
    app: web.Application, path: Path, *, shutdown_s: float = 1.0, mode: int = SOCKET_MODE
) -> AsyncIterator[None]:
    """Serve ``app`` on a Unix socket at ``path`` while the scope lasts.

    Raises:
        AdminSocketError: The socket cannot be taken.
    """
    listener = take_socket(path, mode=mode)
    inode = inode_of(path)
    try:
        async with serving(app, listener, shutdown_s=shutdown_s):
            yield
    finally:
        release_socket(path, inode=inode)
