"""One streamed completion over a raw socket, parsed no further than needed: when did events come, how many tokens."""

import asyncio
import re
import time
from typing import Final

import msgspec

from tests.bench.load_messages import Prompt

_EVENT: Final = b'data: {"'  # cannot be within a JSON string, where a quote is escaped
_DONE: Final = b"data: [DONE]"
_USAGE: Final = re.compile(rb'"completion_tokens":\s*(\d+)')
_KEPT_BYTES: Final = 4096  # of the end of the stream, where the usage is


class StreamFailed(Exception):
    """The server refused, or broke off; the message has its words."""


class SseStream(asyncio.Protocol):
    """A request and its answer. ``done`` is resolved with the server's count of tokens."""

    def __init__(self, request: bytes, times_s: list[float]) -> None:
        self._request = request
        self._times_s = times_s
        self._carry = b""
        self._tail = b""
        self._is_open = False
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        assert self.transport is not None
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self._is_open:
            if not data.startswith(b"HTTP/1.1 200"):
                self._fail(data.decode(errors="replace"))
                return
            self._is_open = True
        joined = self._carry + data
        self._times_s += [now] * joined.count(_EVENT)
        self._carry = joined[1 - len(_EVENT) :] if not joined.endswith(_EVENT) else b""
        self._tail = (self._tail + data)[-_KEPT_BYTES:]
        if _DONE in self._tail:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the server broke off: {exc or self._tail.decode(errors='replace')[-300:]}")

    def hang_up(self) -> None:
        """Leave without waiting for the rest."""
        if not self.done.done():
            self.done.cancel()
        if self.transport is not None:
            self.transport.abort()

    def _finish(self) -> None:
        counts = _USAGE.findall(self._tail)
        if not counts:
            self._fail("the stream ended without usage")
            return
        if self._times_s:
            self._times_s.pop()  # the event of the usage is no token
        self.done.set_result(int(counts[-1]))
        assert self.transport is not None
        self.transport.close()

    def _fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(StreamFailed(reason))


def request_bytes(*, host: str, model: str, prompt: Prompt, max_tokens: int) -> bytes:
    """Return a streaming completion request as it goes over the wire: greedy, to the last token, with usage."""
    body = msgspec.json.encode(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
