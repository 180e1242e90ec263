"""Heads that are too large or too slow, clients that take nothing, errors that no handler sees; over real sockets."""

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web
from structlog.testing import capture_logs

from flexpiped.api.event_stream import EventStream
from flexpiped.connections import ConnectionLimits
from flexpiped.servers import listen_tcp, serving
from flexpiped.tls import LiveTls, load_tls
from tests.support.certificates import make_certificate

pytestmark = pytest.mark.real_loop
SECRET = "sk-very-secret"


async def hello(_request: web.Request) -> web.Response:
    return web.Response(text="hello")


async def broken(request: web.Request) -> web.Response:
    raise RuntimeError(f"cannot go on with {request.headers['Authorization']}")


@pytest.fixture
async def port() -> AsyncIterator[int]:
    app, listener = web.Application(), listen_tcp("127.0.0.1", 0)
    app.add_routes([web.get("/", hello), web.get("/broken", broken)])
    number: int = listener.getsockname()[1]
    limits = ConnectionLimits(header_deadline_s=0.3, max_header_line_bytes=1024)
    async with serving(app, listener, shutdown_s=1.0, limits=limits):
        yield number


async def answer_to(port: int, head: str, *, then_close: bool = True) -> str:
    """Return all that comes until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode("latin-1"))
        if then_close:
            await writer.drain()
        async with asyncio.timeout(10.0):
            return (await reader.read()).decode()
    finally:
        writer.close()


async def test_connections_are_kept_alive_by_the_kernel() -> None:
    """A client whose host is gone is noticed; the socket that listens hands it on."""
    listener = listen_tcp("127.0.0.1", 0)
    with listener, socket.create_connection(listener.getsockname()):
        accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_a_stream_begins_and_ends_with_its_events() -> None:
    """Head and first events are one write, and so are the last ones and the end of the body."""

    async def stream(request: web.Request) -> web.StreamResponse:
        response = EventStream(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        going_on.clear()
        await going_on.wait()
        await response.write_eof(b"data: 2\n\n")
        return response

    going_on = asyncio.Event()
    app, listener = web.Application(), listen_tcp("127.0.0.1", 0)
    app.add_routes([web.get("/", stream)])
    async with serving(app, listener, shutdown_s=1.0):
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        begin = await reader.read(1 << 16)
        assert begin.startswith(b"HTTP/1.1 200")
        assert begin.endswith(b"\r\n\r\n9\r\ndata: 1\n\n\r\n")
        going_on.set()
        assert await reader.read(1 << 16) == b"9\r\ndata: 2\n\n\r\n0\r\n\r\n"
        writer.close()


def error_of(answer: str) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition("\r\n\r\n")
    assert "application/json" in head
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "head",
    [
        f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}{'x' * 1200}\r\n\r\n",
        f"GET /?{SECRET}{'x' * 1200} HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_a_line_that_is_too_long_is_431(port: int, head: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, error = error_of(await answer_to(port, head))
    assert (status, error["message"]) == (431, "a line of the request's head is too long")
    assert SECRET not in "".join(capfd.readouterr())


async def test_a_line_that_is_just_short_enough_is_taken(port: int) -> None:
    answer = await answer_to(port, f"GET / HTTP/1.1\r\nHost: x\r\nX-Long: {'x' * 1000}\r\nConnection: close\r\n\r\n")
    assert answer.endswith("hello")


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        ("GET / HTTP/1.1\r\nHost: x\r\n" + "X-A: 1\r\n" * 200 + "\r\n", 431, "too many lines: 128 headers"),
        ("GET / HTTP/1.1\r\n\r\n", 400, "no Host header"),
        ("DO / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "method is none of HTTP's"),
        ("GET / HTTP/1.1\r\nHost: x\r\nExpect: much\r\n\r\n", 417, "Expect: only 100-continue"),
        (
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\nx",
            415,
            "gzip and deflate are",
        ),
    ],
)
async def test_what_cannot_be_read_says_why(port: int, sent: str, status: int, said: str) -> None:
    found, error = error_of(await answer_to(port, sent))
    assert found == status
    assert said in error["message"]


@pytest.mark.parametrize(
    ("rubbish", "said"),
    [
        (f"{SECRET}\r\n\r\n", "the request's method is none of HTTP's"),
        (f"GET / HTTP/1.1\r\nBad\x00{SECRET}\r\n\r\n", "this is not valid HTTP"),
    ],
)
async def test_what_is_not_http_is_refused_and_not_logged(
    port: int, rubbish: str, said: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    status, error = error_of(await answer_to(port, rubbish))
    assert (status, error["message"], error["type"]) == (400, said, "invalid_request_error")
    assert SECRET not in caplog.text + "".join(capfd.readouterr())


async def test_a_mistake_of_ours_is_logged_without_the_request(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with capture_logs() as logs:
        answer = await answer_to(port, f"GET /broken HTTP/1.1\r\nHost: x\r\nAuthorization: {SECRET}\r\n\r\n")
    status, error = error_of(answer)
    assert (status, error["type"]) == (500, "internal_error")
    (event,) = logs
    assert (event["event"], event["method"], event["error"]) == ("request failed", "GET", "RuntimeError")
    assert "in broken" in event["frames"][-1]
    assert SECRET not in answer + str(logs) + caplog.text


@pytest.mark.parametrize("sent", ["", "GET / HTTP/1.1\r\nHost: x\r\n", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_a_head_that_does_not_come_in_time_closes_the_connection(port: int, sent: str) -> None:
    """None at all, half of one, and none after a first request."""
    answer = await answer_to(port, sent)
    assert answer.endswith("hello") is sent.endswith("\r\n\r\n")


async def test_bytes_that_trickle_in_do_not_put_it_off(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def trickle() -> None:
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n")
        while True:
            writer.write(b"X-A: b\r\n")
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    async with asyncio.timeout(10.0):
        with suppress(ConnectionResetError):  # what came after the end is answered so
            assert await reader.read() == b""
    trickling.cancel()
    writer.close()


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_client_that_takes_nothing_ends_its_handler(
    tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop], is_tls: bool
) -> None:
    """On the loop that the daemon has, and on the other, which have transports of their own."""
    front, trusted = tls_of(tmp_path) if is_tls else (None, None)
    began, ended = asyncio.Event(), asyncio.Event()

    async def for_ever(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        began.set()
        try:
            while True:
                await response.write(b"x" * 10_000)
        finally:
            ended.set()

    async def ask_and_take_nothing() -> None:
        app, listener = web.Application(), listen_tcp("127.0.0.1", 0)
        app.add_routes([web.get("/", for_ever)])
        port, limits = listener.getsockname()[1], ConnectionLimits(send_deadline_s=0.2)
        async with serving(app, listener, shutdown_s=1.0, limits=limits, tls=front):
            _reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusted)  # takes 128 KiB
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(30.0):
                await began.wait()
                await ended.wait()
            writer.transport.abort()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(ask_and_take_nothing())


def tls_of(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return what the server has, and a client that trusts it."""
    certificate, key = make_certificate(folder, "server")
    context = load_tls(certificate, key)
    assert context is not None
    return LiveTls(context).front, ssl.create_default_context(cafile=certificate)
