"""A stage's side of the keeper of parameters. Where that cannot be reached a stage reads its layers as without it."""

import os
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import msgspec

from engines.parameters import messages as p

# The daemon answers within milliseconds, on an overloaded machine within seconds. Who is late is not asked again,
# so a start hangs on a daemon that never answers but once.
_DEADLINE_S: Final = 10.0


class ParameterClient:
    """One process's connection, made at first use. Methods may be called from several threads; ``left`` never waits.

    Args:
        address: Name of the keeper's socket; empty: there is none.
        of: Which model the layers are of, for those who want to know what is kept of it.
    """

    def __init__(self, address: str, *, of: str = "") -> None:
        self._address = address
        self._of = of
        self._socket: socket.socket | None = None
        self._asking = threading.Lock()

    @property
    def is_there(self) -> bool:
        """Whether there is a keeper to ask; False for good once it did not answer."""
        return bool(self._address)

    def take(self, key: str) -> int | None:
        """Return a descriptor of a layer's memory, which then belongs to the caller; None: it is not kept."""
        answer, descriptors = self._ask(p.Take(key=key))
        if isinstance(answer, p.Found) and answer.is_here and descriptors:
            return descriptors[0]
        return None

    def keep(self, key: str, *, name: str, descriptor: int) -> bool:
        """Offer a layer's memory to be kept; say whether it is."""
        answer, _ = self._ask(p.Keep(key=key, name=name, of=self._of), descriptor)
        return isinstance(answer, p.Noted) and answer.is_kept

    def hold(self, key: str, *, name: str, ranges: Sequence[tuple[str, int, int]]) -> bool:
        """Have pieces of files stay in memory; say whether they do."""
        answer, _ = self._ask(p.Hold(key=key, name=name, of=self._of, ranges=list(ranges)))
        return isinstance(answer, p.Noted) and answer.is_kept

    def left(self, key: str) -> None:
        """Say that this process has let go of a layer."""
        connection = self._socket
        if connection is not None:
            with suppress(OSError):  # a keeper that is gone has no use for it
                connection.send(p.encode(p.Left(key=key)), socket.MSG_DONTWAIT)

    def go_to(self, address: str) -> None:
        """Ask another keeper from now on; empty: there is none."""
        with self._asking:
            self._give_up()
            self._address = address

    def close(self) -> None:
        """End the connection: this process has no layers any more, and asks for none. Idempotent."""
        self._give_up()

    def _ask(self, question: p.Question, *descriptors: int) -> tuple[p.Answer | None, list[int]]:
        raw = p.encode(question)
        if not self._address or len(raw) > p.MOST_BYTES:
            return None, []
        with self._asking:
            try:
                return self._answer_to(raw, descriptors)
            except (OSError, msgspec.DecodeError):
                self._give_up()
                return None, []

    def _answer_to(self, raw: bytes, descriptors: Sequence[int]) -> tuple[p.Answer, list[int]]:
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket = connection  # closed with the rest, whatever comes of it
            connection.settimeout(_DEADLINE_S)
            connection.connect(f"\0{self._address}")
        socket.send_fds(self._socket, [raw], descriptors)
        answer, found, _, _ = socket.recv_fds(self._socket, p.MOST_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        if not answer:
            raise ConnectionResetError
        try:
            return p.decode_answer(answer), found
        except msgspec.DecodeError:
            for each in found:
                os.close(each)
            raise

    def _give_up(self) -> None:
        """Ask no more: an answer that is late must not be taken for that to another question."""
        connection, self._socket, self._address = self._socket, None, ""
        if connection is not None:
            connection.close()
