"""A public stand-in for an engine's own server: streams of events with no model behind them, as cheaply as Python can.

``python -m tests.bench.sse_backend --socket PATH --host HOST --port PORT`` listens on both. A completion has
``max_tokens`` events; ``vllm_xargs.pace_s`` is the time from one to the next, 0: as fast as they are taken. All streams
of a pace get their tokens in one step, as those of an engine do. The text of each event is the time at which it was
sent, in nanoseconds of the monotonic clock.
"""

import argparse
import asyncio
import time
from typing import Any, Final

import msgspec
import uvloop

_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_BACKLOG: Final = 1024
_HEALTHY: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
_EVENT: Final = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,'
    b'"model":"bench","choices":[{"index":0,"text":"%d","logprobs":null,"finish_reason":null}]}\n\n'
)
_END: Final = (
    b'data: {"id":"cmpl-0","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d}}\n\ndata: [DONE]\n\n'
)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Steps:
    """Gives every stream of one pace its next token at once."""

    def __init__(self, pace_s: float) -> None:
        self._pace_s = pace_s
        self._streams: set[Connection] = set()
        self._running: asyncio.Task[None] | None = None

    def add(self, stream: "Connection") -> None:
        self._streams.add(stream)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())

    def remove(self, stream: "Connection") -> None:
        self._streams.discard(stream)

    async def _run(self) -> None:
        while self._streams:
            for stream in tuple(self._streams):
                stream.step()
            await asyncio.sleep(self._pace_s)


class Connection(asyncio.Protocol):
    """One connection of a client or a proxy, which may ask again and again."""

    def __init__(self, paces: dict[float, Steps]) -> None:
        self._paces = paces
        self._steps: Steps | None = None
        self._received = b""
        self._left = self._wanted = 0
        self._is_full = False
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self._steps is not None:
            self._steps.remove(self)

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        if head.startswith(b"GET"):
            self._received = b""
            self._write(_HEALTHY)
            return
        lines = head.lower().splitlines()
        length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))
        if len(body) >= length:
            self._received = b""
            self._begin(msgspec.json.decode(body))

    def step(self) -> None:
        """Send a token, unless the client has not taken the last ones."""
        if self._is_full:
            return
        self._write(_chunk(_EVENT % time.monotonic_ns()))
        self._left -= 1
        if self._left == 0:
            self._write(_chunk(_END % self._wanted) + b"0\r\n\r\n")
            assert self._steps is not None
            self._steps.remove(self)

    def _begin(self, body: dict[str, Any]) -> None:
        self._left = self._wanted = body["max_tokens"]
        pace_s = body.get("vllm_xargs", {}).get("pace_s", 0.0)
        self._write(_HEAD)
        self._steps = self._paces.setdefault(pace_s, Steps(pace_s))
        self._steps.add(self)

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)


async def _serve(options: argparse.Namespace) -> None:
    loop, paces = asyncio.get_running_loop(), dict[float, Steps]()
    await loop.create_unix_server(lambda: Connection(paces), options.socket, backlog=_BACKLOG)
    server = await loop.create_server(lambda: Connection(paces), options.host, options.port, backlog=_BACKLOG)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--socket", "--host", "--port"):
        parser.add_argument(option, required=True)
    uvloop.run(_serve(parser.parse_args()))
