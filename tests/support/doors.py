"""The ingress processes of a daemon one by one, each by connections that the kernel has given to it."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from tests.support.until import until

_MOST_TRIED: Final = 64  # connections, of which the kernel gives every second one to each of two


def children_of(pid: int) -> dict[int, str]:
    """Return command lines of the children of a process, by pid."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


def ingresses_of(daemon: int) -> set[int]:
    """Return the process ids of the ingresses of a daemon, of which the id is given."""
    return {pid for pid, command in children_of(daemon).items() if "flexpiped.ingress" in command}


class Door:
    """One of several processes that share a port. ``url``: of the port; ``pid``: of the process."""

    def __init__(self, url: str, pid: int) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        assert address.port is not None
        self._host, self._port = address.hostname, address.port
        self.pid = pid

    @asynccontextmanager
    async def asked(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
        """Ask, and yield the status with the reader of what follows the head. Leaving the scope hangs up.

        It is asked in HTTP/1.0, so that what follows is the body itself, up to the end of the connection.
        """
        reader, writer = await self._connected()
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.0", "Host: localhost", f"Content-Length: {len(data)}", "", ""]
        writer.write("\r\n".join(lines).encode() + data)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            yield int(head.split()[1]), reader
        finally:
            writer.close()

    async def answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Return the status and the answer, which is JSON."""
        async with self.asked(method, path, body) as (status, reader):
            return status, json.loads(await reader.read())

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for _ in range(_MOST_TRIED):
            reader, writer = await asyncio.open_connection(self._host, self._port)
            if await self._has_accepted(writer.get_extra_info("sockname")[1]):
                return reader, writer
            writer.close()
        raise ConnectionError(f"process {self.pid} was given none of {_MOST_TRIED} connections")

    async def _has_accepted(self, client_port: int) -> bool:
        """Wait until somebody has accepted the connection from this port, and say whether this process did."""
        await until(lambda: self._inode(client_port) != 0)
        return f"socket:[{self._inode(client_port)}]" in _open_files(self.pid)

    def _inode(self, client_port: int) -> int:
        """Return that of the server's end of a connection; 0: nobody has accepted it yet."""
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            ends = [int(field.rpartition(":")[2], 16) for field in fields[1:3]]
            if ends == [self._port, client_port]:
                return int(fields[9])
        return 0


def _open_files(pid: int) -> set[str]:
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(descriptor))  # noqa: PTH115  a Path would read the name as one
    return found
