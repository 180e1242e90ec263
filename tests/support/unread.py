"""A client that asks and reads nothing of its answer."""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

LEAST_BUFFER_BYTES: Final = 4096  # of the kernel, at either end: so that what is not read is noticed soon
_NONE: Final[Mapping[str, str]] = MappingProxyType({})


@asynccontextmanager
async def unread(
    url: str, body: Mapping[str, Any], *, path: str = "/v1/completions", headers: Mapping[str, str] = _NONE
) -> AsyncIterator[socket.socket]:
    """Ask the server at ``url`` (``http://HOST:PORT``), and yield the connection, on which much of the answer waits."""
    address = urlsplit(url)
    loop = asyncio.get_running_loop()
    data = msgspec.json.encode(body)
    lines = [f"POST {path} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in headers.items())]
    head = "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode()
    with socket.socket() as channel:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LEAST_BUFFER_BYTES)
        channel.setblocking(False)
        await loop.sock_connect(channel, (address.hostname, address.port))
        await loop.sock_sendall(channel, head + data)
        yield channel


async def rest_of(channel: socket.socket) -> bytes:
    """Return all that comes until the other side closes the connection."""
    read, loop = b"", asyncio.get_running_loop()
    with suppress(ConnectionResetError):
        async with asyncio.timeout(10.0):
            while part := await loop.sock_recv(channel, 1 << 16):
                read += part
    return read
