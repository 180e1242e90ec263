"""A port of a booted machine, which has a network of its own, at a port of this host: for a browser here."""

import asyncio
import ctypes
import os
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress

_CLONE_NEWNET = 0x40000000


@asynccontextmanager
async def port_of(leader: int, port: int) -> AsyncIterator[str]:
    """Yield the address here of ``port`` there.

    Args:
        leader: A process of the machine, by the pid that it has here.
    """

    def enter() -> None:
        """Move this thread, and nothing else, into the machine's network."""
        file = os.open(f"/proc/{leader}/ns/net", os.O_RDONLY)
        entered = ctypes.CDLL(None, use_errno=True).setns(file, _CLONE_NEWNET)
        os.close(file)
        assert entered == 0, os.strerror(ctypes.get_errno())

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port))

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected = await asyncio.get_running_loop().run_in_executor(inside, connect)
        its_reader, its_writer = await asyncio.open_connection(sock=connected)
        await asyncio.gather(_pass_on(reader, its_writer), _pass_on(its_reader, writer))

    with ThreadPoolExecutor(1, initializer=enter) as inside:
        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        async with server:
            host, here = server.sockets[0].getsockname()
            yield f"http://{host}:{here}"


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes, to the end of either side."""
    try:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
    finally:  # also where the scope is left under a stream
        writer.close()
