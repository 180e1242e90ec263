"""How KV blocks travel between two workers of one host: shared memory, announced by a datagram.

The source writes KV block ids and bytes into one of its buffers and tells the destination which. A thread there copies
them into the layer's new KV cache, which no step reads yet, and acknowledges: that frees the buffer. Nothing needs a
rendezvous, and the destination's steps are not held up.

A GPU takes the same way through pinned host memory; that was not run on a GPU yet.
"""

import json
import mmap
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_ID_BYTES = 8
_RECEIVE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Notice:
    """What a datagram says: where KV blocks of some layers lie, and who wants to know that they are copied."""

    handover: int
    source: int  # rank of the sender
    ticket: int
    pid: int
    fd: int
    start: int
    layers: list[int]
    num_blocks: int
    reply_to: str

    def encode(self) -> bytes:
        return json.dumps([getattr(self, name) for name in self.__slots__]).encode()

    @staticmethod
    def decode(raw: bytes) -> "Notice":
        return Notice(*json.loads(raw))


class Staging:
    """Buffers of one worker for what it sends: ``count`` of ``size`` bytes, beside room for the KV block ids."""

    def __init__(self, *, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._stride = 2 * size
        self.fd = os.memfd_create("flexpiped-kv")
        os.ftruncate(self.fd, count * self._stride)
        self._map = mmap.mmap(self.fd, count * self._stride)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def start_of(self, buffer: int) -> int:
        return buffer * self._stride

    def ids(self, buffer: int, num_blocks: int) -> torch.Tensor:
        start = self.start_of(buffer)
        return self._bytes[start : start + num_blocks * _ID_BYTES].view(torch.int64)

    def data(self, buffer: int, num_blocks: int, num_bytes: int) -> torch.Tensor:
        start = self.start_of(buffer) + num_blocks * _ID_BYTES
        return self._bytes[start : start + num_bytes]

    def close(self) -> None:
        os.close(self.fd)


class _Mapped:
    """The buffers of another worker, mapped for reading."""

    def __init__(self, pid: int, fd: int) -> None:
        with Path(f"/proc/{pid}/fd/{fd}").open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def read(self, notice: Notice, data_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        middle = notice.start + notice.num_blocks * _ID_BYTES
        ids = self._bytes[notice.start : middle].view(torch.int64)
        return ids, self._bytes[middle : middle + data_bytes]


def bind_datagram(path: Path) -> socket.socket:
    """Return a datagram socket at ``path``."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(str(path))
    return made


class Receiver:
    """The thread of a worker that copies in what others send.

    Args:
        copy_in: Copies; gets a notice, and a function from a number of bytes to KV block ids and those bytes. Returns
            why not, or nothing.
    """

    def __init__(
        self, path: Path, copy_in: Callable[[Notice, Callable[[int], tuple[torch.Tensor, torch.Tensor]]], str]
    ) -> None:
        self._socket = bind_datagram(path)
        self._copy_in = copy_in
        self._sources: dict[tuple[int, int], _Mapped] = {}
        threading.Thread(target=self._run, name="flexpiped-kv", daemon=True).start()

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                notice = Notice.decode(self._socket.recv(_RECEIVE_BYTES))
                self._answer(notice, self._copy(notice))

    def _copy(self, notice: Notice) -> str:
        try:
            source = self._source(notice)
            return self._copy_in(notice, lambda size: source.read(notice, size))
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"

    def _source(self, notice: Notice) -> _Mapped:
        key = (notice.pid, notice.fd)
        if key not in self._sources:
            self._sources = {key: _Mapped(*key), **self._sources}
        return self._sources[key]

    def _answer(self, notice: Notice, reason: str) -> None:
        answer = json.dumps([notice.handover, notice.source, notice.ticket, reason]).encode()
        with suppress(OSError):  # who asked is gone, and with it the handover
            self._socket.sendto(answer, notice.reply_to)
