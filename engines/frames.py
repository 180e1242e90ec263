"""Length-prefixed frames on a stream socket: four bytes little-endian, then that many bytes."""

import asyncio
import socket
import struct

_LENGTH = struct.Struct("<I")


def write_frame(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Queue one frame for sending."""
    writer.write(_LENGTH.pack(len(data)) + data)


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """Return the next frame, or None when the other side is gone."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):  # a write that failed ends the reading, too
        return None


def send_frame(connection: socket.socket, data: bytes) -> None:
    """Send one frame on a blocking socket."""
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive_frame(connection: socket.socket) -> bytes:
    """Receive one frame on a blocking socket.

    Raises:
        EOFError: The other side is gone.
    """
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    return _receive_exactly(connection, length)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = connection.recv(size)
        if not part:
            raise EOFError("the connection was closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
