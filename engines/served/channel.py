"""JSON lines to a plugin of ours inside an engine: calls that are answered, messages that are not."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

Message = dict[str, Any]
_LINE_LIMIT: Final = 64 << 20  # a prompt is one line
_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode


class ChannelClosed(Exception):
    """The other side is gone, or this side has closed the channel."""


class CallFailed(Exception):
    """The other side answered a call with an error; the message is its own."""


class Channel:
    """One connection.

    Args:
        on_message: Told every message that answers no call.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, on_message: Callable[[Message], None]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._on_message = on_message
        self._calls: dict[int, tuple[asyncio.Future[Any], Callable[[Message], None] | None]] = {}
        self._last_call = 0
        self._open = True
        self._reading = asyncio.create_task(self._read(), name="engine-channel")

    @classmethod
    async def connect(cls, path: Path, *, on_message: Callable[[Message], None] = lambda _message: None) -> "Channel":
        """Connect to the Unix socket at ``path``. Raises: OSError."""
        reader, writer = await asyncio.open_unix_connection(path, limit=_LINE_LIMIT)
        return cls(reader, writer, on_message=on_message)

    async def call(self, op: str, *, on_progress: Callable[[Message], None] | None = None, **fields: object) -> Any:
        """Send a call and return its result. ``on_progress`` is told messages with the call's number before that.

        Raises:
            ChannelClosed, CallFailed
        """
        if not self._open:
            raise ChannelClosed("the channel is closed")
        self._last_call += 1
        call, answer = self._last_call, asyncio.get_running_loop().create_future()
        self._calls[call] = (answer, on_progress)
        self.send({"op": op, "call": call, **fields})
        try:
            return await answer
        finally:
            self._calls.pop(call, None)

    async def core(self, method: str, *arguments: object) -> Any:
        """Call a method that our plugin added to what schedules the engine's steps. Raises as ``call``."""
        return await self.call("core", method=f"flexpiped_{method}", args=list(arguments))

    def send(self, message: Message) -> None:
        """Send a message that is not answered. Nothing happens when the channel is closed."""
        if self._open:
            self._writer.write(_encode(message) + b"\n")

    async def wait_closed(self) -> None:
        """Return when the other side is gone or the channel was closed."""
        await asyncio.wait([self._reading])

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        self._reading.cancel()
        await asyncio.wait([self._reading])
        with suppress(ConnectionError):
            self._writer.close()
            await self._writer.wait_closed()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                self._take(_decode(line))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # as good as an end of file
        finally:
            self._open = False
            for answer, _ in self._calls.values():
                if not answer.done():
                    answer.set_exception(ChannelClosed("the other side is gone"))

    def _take(self, message: Message) -> None:
        waiting = self._calls.get(message.get("call", 0))
        if waiting is None:
            if message["op"] != "reply":  # of a call that was given up
                self._on_message(message)
            return
        answer, on_progress = waiting
        if message["op"] != "reply":
            if on_progress is not None:
                on_progress(message)
        elif not answer.done():
            if "error" in message:
                answer.set_exception(CallFailed(message["error"]))
            else:
                answer.set_result(message["result"])
