"""Length-prefixed frames, read whole or not at all."""

import asyncio
import socket
from collections.abc import Iterator
from threading import Thread

import pytest

from engines.frames import read_frame, receive_frame, send_frame

FRAMES = [b"", b"a", b"length \x05\0\0\0 within", bytes(300_000)]


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def reader_of(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def test_frames_go_over_a_socket(ends: tuple[socket.socket, socket.socket]) -> None:
    def send() -> None:
        for data in FRAMES:
            send_frame(ends[0], data)

    sender = Thread(target=send)
    sender.start()
    assert [receive_frame(ends[1]) for _ in FRAMES] == FRAMES
    sender.join()


def test_on_the_wire_a_frame_is_its_length_and_its_bytes(ends: tuple[socket.socket, socket.socket]) -> None:
    send_frame(ends[0], b"abc")
    assert ends[1].recv(100) == b"\x03\0\0\0abc" == framed(b"abc")


@pytest.mark.parametrize("sent", [b"", b"\x03\0", b"\x03\0\0\0ab"])
def test_a_socket_closed_within_a_frame_is_an_end(sent: bytes, ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].sendall(sent)
    ends[0].close()
    with pytest.raises(EOFError, match="closed"):
        receive_frame(ends[1])


async def test_a_stream_gives_frames_then_none() -> None:
    reader = reader_of(b"".join(map(framed, FRAMES)))
    assert [await read_frame(reader) for _ in FRAMES] == FRAMES
    assert await read_frame(reader) is None


@pytest.mark.parametrize("sent", [b"\x03\0", b"\x03\0\0\0ab"])
async def test_a_stream_cut_within_a_frame_is_none(sent: bytes) -> None:
    assert await read_frame(reader_of(sent)) is None


async def test_a_connection_reset_is_none() -> None:
    reader = asyncio.StreamReader()
    reader.set_exception(ConnectionResetError())
    assert await read_frame(reader) is None


async def test_a_write_that_failed_ends_the_reading_like_an_end_of_file() -> None:
    reader = asyncio.StreamReader()
    reader.set_exception(BrokenPipeError())
    assert await read_frame(reader) is None
