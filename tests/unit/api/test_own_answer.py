"""Answers of an engine's own server, however they are framed and cut; and what is none."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from flexpiped.api.own_answer import Answer, AnswerBroken, asked
from tests.support.until import until

pytestmark = pytest.mark.real_loop
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nX-Kept: a: b \r\n"
MANY = b"".join(b"%x\r\n%b\r\n" % (len(word), word) for word in [b"w" * (i % 37 + 1) for i in range(500)])
CHUNKS = b"5\r\nhello\r\n1;name=value\r\n \r\n5\r\nworld\r\n0\r\nX-Trailer: x\r\n\r\n"
Send = Callable[[asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(folder: Path, send: Send) -> AsyncIterator[tuple[Path, list[bytes]]]:
    """Answer each connection with what ``send`` writes, then close it; yield also what was asked."""
    received: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.readuntil(b"BODY"))
        try:
            await send(writer)
        finally:
            writer.close()

    path = folder / "socket"
    listening = await asyncio.start_unix_server(handle, str(path))
    try:
        yield path, received
    finally:
        listening.close()
        await listening.wait_closed()


def pieces(*parts: bytes) -> Send:
    async def send(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)

    return send


async def read(folder: Path, send: Send) -> tuple[Answer, bytes]:
    async with server(folder, send) as (path, _):
        with await asked(path, method="POST", target="/", headers=(), body=b"BODY") as answer:
            return answer, await answer.read()


@pytest.mark.parametrize(
    ("head", "body", "expected"),
    [
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", CHUNKS, b"hello world"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n", b""),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"2\r\nab\r\n7\r\nx\r\ny\r\nz\r\n0\r\n\r\n", b"abx\r\ny\r\nz"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"6\r\n1\r\na\r\n\r\n1\r\nb\r\n0\r\n\r\n", b"1\r\na\r\nb"),
        (HEAD + b"Content-Length: 11\r\n\r\n", b"hello world", b"hello world"),
        (HEAD + b"Content-Length: 0\r\n\r\n", b"", b""),
        (HEAD + b"\r\n", b"hello world", b"hello world"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: 2\r\n\r\n", b"ok", b"ok"),
    ],
)
async def test_however_it_is_framed_and_cut(tmp_path: Path, head: bytes, body: bytes, expected: bytes) -> None:
    whole = head + body
    for parts in ([whole], [whole[i : i + 1] for i in range(len(whole))], [head, body], [head[:-1], head[-1:] + body]):
        answer, found = await read(tmp_path, pieces(*parts))
        assert (answer.status, answer.content_type, found) == (200, "text/event-stream", expected)
        assert answer.headers["x-kept"] == "a: b"


@pytest.mark.parametrize("size", [1000, 1001, 4096, 7])
async def test_many_chunks_that_are_cut_anywhere(tmp_path: Path, size: int) -> None:
    body = MANY + b"1;extended\r\n.\r\n" + MANY + b"0\r\n\r\n"
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    words = b"".join(b"w" * (i % 37 + 1) for i in range(500))
    _, found = await read(tmp_path, pieces(head, *(body[i : i + size] for i in range(0, len(body), size))))
    assert found == words + b"." + words


async def test_what_is_asked(tmp_path: Path) -> None:
    async with server(tmp_path, pieces(b"HTTP/1.1 204 No Content\r\n\r\n")) as (path, received):
        headers = [("Host", "x"), ("X-Name", "ö")]
        with await asked(path, method="POST", target="/a?b=c%20d", headers=headers, body=b"BODY") as answer:
            assert (answer.status, await answer.read()) == (204, b"")
    assert received == ["POST /a?b=c%20d HTTP/1.1\r\nHost: x\r\nX-Name: ö\r\nContent-Length: 4\r\n\r\nBODY".encode()]


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        HEAD,
        b"SSH-2.0\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * (1 << 17),
        HEAD + b"Content-Length: x\r\n\r\n",
        HEAD + b"Content-Length: 5\r\n\r\nhell",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nhello\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n",
    ],
)
async def test_what_is_no_answer_or_not_whole(tmp_path: Path, sent: bytes) -> None:
    with pytest.raises(AnswerBroken):
        await read(tmp_path, pieces(sent))
    with pytest.raises(FileNotFoundError):
        await asked(tmp_path / "nobody", method="POST", target="/", headers=(), body=b"")


async def test_what_has_come_is_there_before_the_rest(tmp_path: Path) -> None:
    going_on, left = asyncio.Event(), asyncio.Event()

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n7\r\n wo")
        await going_on.wait()
        writer.write(b"rld!\r\n")
        with suppress(ConnectionError):
            while True:
                writer.write(b"1\r\n.\r\n")
                await writer.drain()
                await asyncio.sleep(0)
        left.set()

    async with server(tmp_path, send) as (path, _):
        with await asked(path, method="POST", target="/", headers=(), body=b"BODY") as answer:
            first = await answer.more()
            while first != b"hello wo":
                first += await answer.more()
            going_on.set()
            assert (await answer.more()).startswith(b"rld!")
            assert not answer.is_whole
        await left.wait()  # who leaves hangs up


async def test_what_comes_while_the_last_part_is_used_is_not_waited_for_again(tmp_path: Path) -> None:
    """The server keeps the connection, as it may."""
    going_on, sent, kept = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await going_on.wait()
        writer.write(b"1\r\n.\r\n0\r\n\r\n")
        await writer.drain()
        sent.set()
        await kept.wait()

    async with server(tmp_path, send) as (path, _):
        with await asked(path, method="POST", target="/", headers=(), body=b"BODY") as answer:
            found = b""
            while part := await answer.more():
                found += part
                if found == b"hello":
                    going_on.set()
                    await sent.wait()
                    for _ in range(10):  # it arrives
                        await asyncio.sleep(0)
            assert answer.is_whole
        kept.set()
    assert found == b"hello."


async def test_who_does_not_take_it_makes_the_server_wait(tmp_path: Path) -> None:
    """And a chunk that is larger than what may wait comes nevertheless."""
    size, sent = 24 << 20, 0

    async def send(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size)
        for _ in range(size >> 16):
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent += 1 << 16
        writer.write(b"\r\n0\r\n\r\n")
        await writer.drain()

    async with server(tmp_path, send) as (path, _):
        with await asked(path, method="POST", target="/", headers=(), body=b"BODY") as answer:
            before = -1
            while before != sent:
                before = sent
                await asyncio.sleep(0.05)
            assert sent < 8 << 20
            assert len(await answer.read()) == size
            await until(lambda: sent == size)


async def test_who_gives_up_before_there_is_an_answer_hangs_up(tmp_path: Path) -> None:
    came, left = asyncio.Event(), asyncio.Event()

    async def send(writer: asyncio.StreamWriter) -> None:
        came.set()
        with suppress(ConnectionError):
            while True:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                await writer.drain()
                await asyncio.sleep(0)
        left.set()

    async with server(tmp_path, send) as (path, _):
        asking = asyncio.create_task(asked(path, method="POST", target="/", headers=(), body=b"BODY"))
        await came.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await left.wait()
