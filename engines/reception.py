"""Where an engine core that outlives its daemon waits for the next one: a Unix socket that it listens on.

It ends by itself when nobody has come in time, or nobody can come any more because the socket is gone: systemd removes
the run directory of a service that is stopped, and keeps that of one that is started again.
"""

import asyncio
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_LOOK_S = 1.0
_CREDENTIALS = struct.Struct("3i")


class Reception:
    """The listening socket. From here on its peer credentials are those of this process: that is how it proves itself.

    Args:
        listener: Bound to a path by the daemon that started this process.
    """

    def __init__(self, listener: socket.socket, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._listener = listener
        self._clock = clock
        self._path = Path(listener.getsockname())
        self._inode = self._path.stat().st_ino
        listener.setblocking(False)
        listener.listen(4)

    def fileno(self) -> int:
        return self._listener.fileno()

    async def next_daemon(self, *, within_s: float) -> socket.socket | None:
        """Return the connection of the next daemon; None: nobody has come, or nobody can."""
        loop, knocked = asyncio.get_running_loop(), asyncio.Event()
        ends_s = self._clock() + within_s
        loop.add_reader(self._listener.fileno(), knocked.set)
        try:
            while self._can_be_found() and (left_s := ends_s - self._clock()) > 0:
                try:
                    await asyncio.wait_for(knocked.wait(), min(_LOOK_S, left_s))
                except TimeoutError:
                    continue
                knocked.clear()
                if (connection := self._admit()) is not None:
                    return connection
        finally:
            loop.remove_reader(self._listener.fileno())
        return None

    def close(self) -> None:
        """Let nobody in any more, and take the socket's name away, unless it is another one's by now."""
        if self._can_be_found():
            with suppress(OSError):  # in a unit of its own it may only look there
                self._path.unlink()
        self._listener.close()

    def _can_be_found(self) -> bool:
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False

    def _admit(self) -> socket.socket | None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again
            return None
        if peer_of(connection)[1] != os.geteuid():
            connection.close()
            return None
        connection.setblocking(False)
        return connection


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return pid and user id of the process at the other end: for one who connected, of the process that listens."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _gid = _CREDENTIALS.unpack(raw)
    return pid, uid
