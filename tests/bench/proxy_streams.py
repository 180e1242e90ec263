"""Streams of the stand-in as a client sees them: how many events, when, and how long each was on its way."""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import msgspec

_SENT: Final = re.compile(rb'"text":"(\d+)"')
_LONGEST: Final = 64  # bytes of an event's text with its key: what may be cut at the end of what comes


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one turn gave. ``on_the_way_s``: of each event; ``first_s``: from the request to the first event."""

    tokens: int
    took_s: float
    on_the_way_s: Sequence[float]
    first_s: Sequence[float]


class _Stream(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self._request = request
        self._raw = self._text = b""  # not read yet: of what came, and of what was in its chunks
        self._has_head = False
        self._began_s = 0.0
        self.first_s = 0.0
        self.on_the_way_s: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._began_s = time.monotonic()
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        self._raw += data
        if not self._has_head:
            head, end, rest = self._raw.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self._fail(f"refused: {self._raw.decode(errors='replace')}")
                return
            self._has_head, self._raw = True, rest
        joined, end_at = self._text + self._unchunked(), 0
        for found in _SENT.finditer(joined):
            self.on_the_way_s.append((now_ns - int(found[1])) / 1e9)
            end_at = found.end()
        if self.on_the_way_s and not self.first_s:
            self.first_s = now_ns / 1e9 - self._began_s
        self._text = joined[max(end_at, len(joined) - _LONGEST) :]
        if b"data: [DONE]" in self._text and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the stream broke off: {exc or self._text!r}")

    def _unchunked(self) -> bytes:
        """Take the chunks that have come as a whole; a proxy may cut them anywhere."""
        parts, raw, at = [], self._raw, 0
        while (line := raw.find(b"\r\n", at)) >= 0:
            start = line + 2
            end = start + int(raw[at:line], 16)
            if len(raw) < end + 2:
                break
            parts.append(raw[start:end])
            at = end + 2
        self._raw = raw[at:]
        return b"".join(parts)

    def _fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(reason))


async def stream(url: str, *, connections: int, tokens: int, pace_s: float) -> Turn:
    """Have so many streams at once. Raises: OSError, where one breaks off or is refused."""
    address = urlsplit(url)
    body = msgspec.json.encode({"prompt": "x", "max_tokens": tokens, "stream": True, "vllm_xargs": {"pace_s": pace_s}})
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    began_s = time.monotonic()
    opened = await asyncio.gather(
        *(
            loop.create_connection(lambda: _Stream(head.encode() + body), address.hostname, address.port)
            for _ in range(connections)
        )
    )
    try:
        await asyncio.gather(*(each.done for _, each in opened))
        took_s = time.monotonic() - began_s
    finally:
        for transport, _ in opened:
            transport.abort()
    on_the_way = [each for _, one in opened for each in one.on_the_way_s]
    if len(on_the_way) != connections * tokens:
        raise OSError(f"{len(on_the_way)} events came, and not {connections * tokens}")
    return Turn(
        tokens=len(on_the_way), took_s=took_s, on_the_way_s=on_the_way, first_s=[one.first_s for _, one in opened]
    )
