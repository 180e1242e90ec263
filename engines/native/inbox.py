"""Inboxes: how the processes of the native engine talk to each other.

An inbox is a pair of connected SOCK_SEQPACKET sockets made before the fork: everybody holds the sending end, one
process reads the other. Messages are atomic and arrive in the order in which any one sender sent them; a reader blocks
without polling. Because the core keeps both ends, an inbox outlives the worker that reads it.
"""

import socket

_MAX_MESSAGE_BYTES = 1 << 20
_SO_SNDBUFFORCE = 32


class Inbox:
    """One process' inbox; the object is inherited through fork by all of them."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._reader, self._writer):
            try:
                end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _MAX_MESSAGE_BYTES * 2)
            except PermissionError:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_MESSAGE_BYTES * 2)

    def fileno(self) -> int:
        """Descriptor to wait on for reading."""
        return self._reader.fileno()

    def send(self, message: bytes) -> None:
        """Deliver one message; blocks while the reader is far behind."""
        self._writer.send(message)

    def receive(self) -> bytes:
        """Return the next message, waiting for it."""
        return self._reader.recv(_MAX_MESSAGE_BYTES)

    def receive_now(self) -> bytes | None:
        """Return the next message if there is one."""
        try:
            return self._reader.recv(_MAX_MESSAGE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def discard_all(self) -> None:
        """Drop what a dead reader has left unread."""
        while self.receive_now() is not None:
            pass

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
