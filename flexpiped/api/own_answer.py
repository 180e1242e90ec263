"""One request to an engine's own server, over its Unix socket, and the answer as it comes.

HTTP/1.1 as far as such servers speak it: answers that are chunked, have a length, or end with the connection. What has
come meanwhile is taken at once, however many chunks it is in: a client that handles each by itself (aiohttp's does)
costs as much again for every token of a stream.

AnswerBroken    the server is not there, is gone before its answer is whole, or says what is no HTTP; an ``OSError``
"""

import asyncio
from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import Final, Protocol, Self, cast

from multidict import CIMultiDict

_MOST_WAITING_BYTES: Final = 1 << 20  # then the server waits, too
_MOST_HEAD_BYTES: Final = 1 << 16
_EMPTY: Final = (204, 304)  # statuses whose answers have no body


class AnswerBroken(ConnectionError):
    """There is no answer, or not the whole of it."""


class Answer:
    """An answer of which the head has come. Leaving its scope closes the connection, so the server ends the request."""

    def __init__(self, connection: "_Connection", *, status: int, headers: CIMultiDict[str], body: "_Body") -> None:
        self._connection = connection
        self._body = body
        self.status = status
        self.headers = headers

    @property
    def content_type(self) -> str:
        """The type without its parameters."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @property
    def is_whole(self) -> bool:
        """Whether the body has been taken to its end."""
        return self._body.is_whole

    async def more(self) -> bytes:
        """Return all that has come of the body meanwhile, waiting for some; nothing: it is whole.

        Raises:
            AnswerBroken
        """
        connection, body = self._connection, self._body
        while not body.is_whole:
            if data := body.take(connection.waiting):
                return data
            if not body.is_whole and not await connection.has_more():
                body.end()
        return b""

    async def read(self) -> bytes:
        """Return the whole body. Raises: AnswerBroken."""
        parts = []
        while part := await self.more():
            parts.append(part)
        return b"".join(parts)


async def asked(socket: Path, *, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes) -> Answer:
    """Ask, and return the answer once its head has come. To be used as a scope.

    Raises:
        AnswerBroken, OSError: There is none.
    """
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode("utf-8", "surrogateescape")
    transport, connection = await asyncio.get_running_loop().create_unix_connection(_Connection, str(socket))
    try:
        transport.write(head + body)
        return await _answer(connection)
    except BaseException:
        connection.close()
        raise


class _Connection(asyncio.Protocol):
    """What came and has not been taken is ``waiting``."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        self._transport: asyncio.Transport | None = None
        self._news: asyncio.Future[None] | None = None
        self._is_paused = self._is_over = False
        self._is_fresh = False  # something has come since somebody asked for more

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.waiting += data
        self._is_fresh = True
        if len(self.waiting) > _MOST_WAITING_BYTES and self._transport is not None and not self._is_paused:
            self._transport.pause_reading()
            self._is_paused = True
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._is_over = True
        self._tell()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def has_more(self) -> bool:
        """Wait until more has come than at the last time; False: nothing will."""
        if self._is_paused and self._transport is not None and not self._is_over:
            self._transport.resume_reading()
            self._is_paused = False
        while not self._is_fresh and not self._is_over:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        has_come, self._is_fresh = self._is_fresh, False
        return has_come

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


async def _answer(connection: _Connection) -> Answer:
    while True:
        while (end := connection.waiting.find(b"\r\n\r\n")) < 0:
            if len(connection.waiting) > _MOST_HEAD_BYTES:
                raise AnswerBroken("the answer's head has no end")
            if not await connection.has_more():
                raise AnswerBroken("the server closed the connection without an answer")
        first, *lines = bytes(connection.waiting[:end]).decode("utf-8", "surrogateescape").split("\r\n")
        del connection.waiting[: end + 4]
        status = _status(first)
        if status >= 200:  # else it is about to answer
            headers = CIMultiDict((name, value.strip()) for name, _, value in (line.partition(":") for line in lines))
            return Answer(connection, status=status, headers=headers, body=_body(status, headers))


def _status(line: str) -> int:
    version, _, rest = line.partition(" ")
    if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
        raise AnswerBroken("the answer is no HTTP")
    return int(rest[:3])


def _body(status: int, headers: CIMultiDict[str]) -> "_Body":
    if status in _EMPTY:
        return _Sized(0)
    if "chunked" in headers.get("Transfer-Encoding", "").lower():
        return _Chunked()
    length = headers.get("Content-Length")
    if length is None:
        return _ToTheEnd()
    if not length.isdecimal():
        raise AnswerBroken("the answer's length is no number")
    return _Sized(int(length))


class _Body(Protocol):
    """Where a body ends."""

    is_whole: bool

    def take(self, waiting: bytearray) -> bytes:
        """Remove from ``waiting`` what belongs to the body, and return it. Raises: AnswerBroken."""

    def end(self) -> None:
        """The connection has ended. Raises: AnswerBroken, if the body should go on."""


class _Sized:
    def __init__(self, length: int) -> None:
        self._left = length
        self.is_whole = length == 0

    def take(self, waiting: bytearray) -> bytes:
        data = bytes(waiting[: self._left])
        del waiting[: len(data)]
        self._left -= len(data)
        self.is_whole = self._left == 0
        return data

    def end(self) -> None:
        raise AnswerBroken("the server closed the connection within its answer")


class _ToTheEnd:
    def __init__(self) -> None:
        self.is_whole = False

    def take(self, waiting: bytearray) -> bytes:
        data = bytes(waiting)
        waiting.clear()
        return data

    def end(self) -> None:
        self.is_whole = True


class _Chunked:
    """A size in hex, perhaps with extensions, on a line, so many bytes, a line's end, and so on to the size 0."""

    def __init__(self) -> None:
        self._left = 0  # of the chunk that is being read
        self._is_behind = False  # a chunk, before the end of its line
        self.is_whole = False

    def take(self, waiting: bytearray) -> bytes:
        parts: list[bytes | bytearray] = []
        at, is_fresh = 0, True
        while not self.is_whole:
            if self._left:
                part = waiting[at : at + self._left]
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                if self._left:
                    break
                self._is_behind = True
            begin = at + 2 * self._is_behind
            if is_fresh:  # one by one, small chunks would take most of the time of a stream
                num_bytes, plain = _plain_chunks(bytes(waiting[begin:]))
                is_fresh = False
                if num_bytes:
                    parts.append(plain)
                    at, self._is_behind = begin + num_bytes, False
                    continue
            line = waiting.find(b"\r\n", begin)
            if line < 0:
                break
            size = _size(waiting[begin:line])
            if size == 0:
                end = waiting.find(b"\r\n\r\n", line)  # behind trailers
                if end < 0:
                    break
                line, self.is_whole = end + 2, True
            at, self._left, self._is_behind = line + 2, size, False
        del waiting[:at]
        return b"".join(parts)

    def end(self) -> None:
        raise AnswerBroken("the server closed the connection within its answer")


def _plain_chunks(data: bytes) -> tuple[int, bytes]:
    """Return what is in the whole chunks at the beginning, and how long they are, the last one of a body not counted.

    Nothing, and 0, where a chunk has a line's end in it, or extensions: those have to be read one by one.
    """
    lines = data.split(b"\r\n")
    num_lines = (len(lines) - 1) // 2 * 2  # of whole chunks: a size and what is in it by turns
    texts, parts = lines[0:num_lines:2], lines[1:num_lines:2]
    try:
        sizes = [*map(int, texts, repeat(16))]
    except ValueError:
        return 0, b""
    if 0 in sizes:
        last = sizes.index(0)
        sizes, texts, parts = sizes[:last], texts[:last], parts[:last]
    if sizes != [*map(len, parts)]:
        return 0, b""
    return sum(sizes) + sum(map(len, texts)) + 4 * len(sizes), b"".join(parts)


def _size(line: bytearray) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise AnswerBroken("the size of a chunk is no number") from None
