"""One end of the socket between the daemon and an ingress process: messages in and out, batched by the event loop."""

import asyncio
from collections.abc import Callable
from typing import Final, Generic, TypeVar, cast

import msgspec

from flexpiped.ingress.messages import Down, FrameReader, Up, pack, unpack_down, unpack_up

Sent = TypeVar("Sent")
Taken = TypeVar("Taken")
LOST: Final = "the connection has ended"


class Channel(asyncio.Protocol, Generic[Sent, Taken]):
    """Sends what one iteration of the loop has collected as one frame, and hands on what comes.

    Args:
        pack, unpack: Of frames, as the messages of this end are.
        on_message: Given each message, in order.
    """

    def __init__(
        self,
        *,
        pack: Callable[[list[Sent]], bytes],
        unpack: Callable[[bytes], list[Taken]],
        on_message: Callable[[Taken], None],
    ) -> None:
        self._pack = pack
        self._unpack = unpack
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader()
        self._outbox: list[Sent] = []
        self._transport: asyncio.WriteTransport | None = None
        self.lost: asyncio.Future[str] = self._loop.create_future()  # why; set once

    def send(self, message: Sent) -> None:
        """Send a message, in order; after the end of the connection it goes nowhere."""
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(message)

    def close(self) -> None:
        """End the connection; what was said before is sent first."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        if outbox and self._transport is not None and not self._transport.is_closing():
            self._transport.write(self._pack(outbox))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is one without being a subclass

    def data_received(self, data: bytes) -> None:
        for body in self._reader.feed(data):
            try:
                messages = self._unpack(body)
            except msgspec.DecodeError as error:
                self._end(f"what came is no message: {error}")
                return
            for message in messages:
                self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(LOST if exc is None else str(exc))

    def _end(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
        if self._transport is not None:
            self._transport.abort()


def up_channel(on_message: Callable[[Down], None]) -> "Channel[Up, Down]":
    """Return the end of an ingress."""
    return Channel(pack=pack, unpack=unpack_down, on_message=on_message)


def down_channel(on_message: Callable[[Up], None]) -> "Channel[Down, Up]":
    """Return the daemon's end."""
    return Channel(pack=pack, unpack=unpack_up, on_message=on_message)
