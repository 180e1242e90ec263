"""Starting an ingress process and talking to it: frames in and out of a pair of sockets that nobody else has."""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable
from pathlib import Path
from typing import Final

from flexpiped.ingress.channel import Channel, down_channel
from flexpiped.ingress.messages import Down, Up

_PACKAGE_PARENT: Final = Path(__file__).resolve().parents[2]


class Child:
    """One life of an ingress process."""

    def __init__(self, process: Process, channel: "Channel[Down, Up]") -> None:
        self._process = process
        self._channel = channel

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Down) -> None:
        """Say something, in order."""
        self._channel.send(message)

    async def ended(self) -> str:
        """Wait until the process has ended, and say how. Cancelling the wait does not end it."""
        status = await self._process.wait()
        return f"killed by {signal.Signals(-status).name}" if status < 0 else f"it ended with status {status}"

    async def close(self) -> None:
        """Kill it if it has not ended. Idempotent."""
        self._channel.close()
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


async def spawn(on_message: Callable[[Up], None]) -> Child:
    """Start one with this interpreter. It ends when this process does, however that ends."""
    ours, theirs = socket.socketpair()
    with theirs:
        path = os.pathsep.join([str(_PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "flexpiped.ingress.process", str(theirs.fileno()), str(os.getpid())),
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "PYTHONPATH": path},
            stdin=DEVNULL,
            stdout=DEVNULL,
        )
    ours.setblocking(False)
    loop = asyncio.get_running_loop()
    _transport, channel = await loop.create_unix_connection(lambda: down_channel(on_message), sock=ours)
    return Child(process, channel)
