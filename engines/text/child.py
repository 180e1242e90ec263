"""Starting the text process and talking to it: frames in and out of one Unix socket."""

import asyncio
import os
import socket
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable
from pathlib import Path
from typing import cast

from engines.process import import_root
from engines.text.errors import TextStartFailed
from engines.text.wire import FrameReader, LastWords, Ready, Reply, Request, pack, unpack_replies

_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
_CLOSE_TIMEOUT_S = 2.0
_NEEDED = "transformers, tokenizers and msgspec"


class Channel(asyncio.Protocol):
    """Sends what one iteration of the loop has collected as one frame, and hands replies on as they come."""

    def __init__(self, on_reply: Callable[[Reply], None]) -> None:
        self._on_reply = on_reply
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader()
        self._outbox: list[Request] = []
        self._transport: asyncio.WriteTransport | None = None
        self._last_words = ""
        self.ready: asyncio.Future[Ready] = self._loop.create_future()
        self.lost: asyncio.Future[str] = self._loop.create_future()  # last words, perhaps none

    def send(self, request: Request) -> None:
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        frame, self._outbox = pack(self._outbox), []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is one without being a subclass

    def data_received(self, data: bytes) -> None:
        for body in self._reader.feed(data):
            for reply in unpack_replies(body):
                match reply:
                    case Ready():
                        self.ready.set_result(reply)
                    case LastWords():
                        self._last_words = reply.reason
                    case _:
                        self._on_reply(reply)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.lost.set_result(self._last_words)


class Child:
    """One life of the text process."""

    def __init__(self, process: Process, channel: Channel, *, python: str) -> None:
        self._process = process
        self._channel = channel
        self._python = python

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, request: Request) -> None:
        self._channel.send(request)

    async def ready(self) -> Ready:
        """Wait until the tokenizer is loaded.

        Raises:
            TextStartFailed: With the process's last words.
        """
        await asyncio.wait((self._channel.ready, self._channel.lost), return_when=asyncio.FIRST_COMPLETED)
        if self._channel.ready.done():
            return self._channel.ready.result()
        reason = await self.ended()
        if not self._channel.lost.result():  # it did not come as far as to say why
            reason += f"; {self._python} must be a Python with {_NEEDED}"
        raise TextStartFailed(f"the text process did not start: {reason}")

    async def ended(self) -> str:
        """Wait until the process has gone, and say why. Cancelling the wait does not end the process."""
        last_words = await asyncio.shield(self._channel.lost)
        return last_words or f"it ended with status {await self._process.wait()}"

    async def close(self) -> None:
        """Close the channel, which ends the process; kill it when it takes too long."""
        self._channel.close()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


async def spawn(*, python: str, model: Path, on_reply: Callable[[Reply], None]) -> Child:
    """Start a text process for ``model`` with the interpreter ``python``.

    Raises:
        TextStartFailed: The interpreter cannot be run.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        path = os.pathsep.join([str(import_root()), *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            process = await asyncio.create_subprocess_exec(
                *(python, "-m", "engines.text.process", str(model), str(theirs.fileno()), str(os.getpid())),
                pass_fds=(theirs.fileno(),),
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
                stdin=DEVNULL,
                stdout=DEVNULL,
                start_new_session=True,  # Ctrl-C at a terminal is for the daemon alone
            )
        except OSError as error:
            ours.close()
            raise TextStartFailed(f"the text process did not start: {python}: {error.strerror}") from error
    ours.setblocking(False)
    _transport, channel = await asyncio.get_running_loop().create_unix_connection(lambda: Channel(on_reply), sock=ours)
    return Child(process, channel, python=python)
