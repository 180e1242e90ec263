"""Measures the channel between stage workers: ``python -m engines.native.measure_links JSON``. No torch.

JSON: ``{"device_ids": [...], "pairs": [["cpu:0", "cpu:1"], ...]}``. Each result is a line on standard output, as it
comes: ``{"a": ..., "b": ..., "bandwidth_bytes_per_s": ..., "latency_s": ...}``.

What is measured is how KV cache moves: one process copies a piece into its shared staging buffers and tells the other,
which copies it out, with as many pieces under way as in a handover. The latency is that of a few bytes and the message.
"""

import json
import os
import signal
import statistics
import struct
import sys
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

import numpy as np

from engines.native.inbox import Inbox
from engines.native.shared import STAGING_BUFFERS, SharedMemory, SharedSizes
from engines.process import die_with_parent

_PIECE_BYTES: Final = 512 << 10
_PIECES: Final = 64  # of one pass: 32 MiB, more than most caches
_PASSES: Final = 5
_PINGS: Final = 200
_NICE: Final = 10  # as stage workers run
_MESSAGE: Final = struct.Struct("iii")  # kind, from, number
_RESULT: Final = struct.Struct("dd")


class _Kind(IntEnum):
    MEASURE = 0  # number: the worker to measure to
    PIECE = 1  # number: of the piece
    TAKEN = 2
    PING = 3
    EXIT = 4


class _Worker:
    """One of the processes; it answers whoever measures to it."""

    def __init__(self, index: int, inboxes: Sequence[Inbox], shared: SharedMemory, results: Inbox) -> None:
        self._index = index
        self._inboxes = inboxes
        self._shared = shared
        self._results = results
        self._private = np.empty(0, dtype=np.uint8)

    def run(self) -> None:
        while True:
            kind, source, number = _MESSAGE.unpack(self._inboxes[self._index].receive())
            match kind:
                case _Kind.MEASURE:
                    self._results.send(_RESULT.pack(self._rate_to(number), self._latency_to(number)))
                case _Kind.PIECE:
                    np.copyto(self._piece(number), self._staging(source, number))
                    self._tell(source, _Kind.TAKEN, number)
                case _Kind.PING:
                    self._tell(source, _Kind.TAKEN, number)
                case _:
                    return

    def _rate_to(self, target: int) -> float:
        """Return bytes per second of the best of some passes: what others compute meanwhile is not the link's."""
        self._pass_to(target)  # touches all memory
        return _PIECES * _PIECE_BYTES / min(self._pass_to(target) for _ in range(_PASSES))

    def _pass_to(self, target: int) -> float:
        began_s = time.perf_counter()
        for number in range(_PIECES):
            if number >= STAGING_BUFFERS:
                self._wait()
            np.copyto(self._staging(self._index, number), self._piece(number))
            self._tell(target, _Kind.PIECE, number)
        for _ in range(min(STAGING_BUFFERS, _PIECES)):
            self._wait()
        return time.perf_counter() - began_s

    def _latency_to(self, target: int) -> float:
        """Return half of the median time there and back, in seconds."""
        times: list[float] = []
        few = self._shared.staging(self._index, 0)[:64]
        for number in range(_PINGS):
            began_s = time.perf_counter()
            few[:] = bytes(64)
            self._tell(target, _Kind.PING, number)
            self._wait()
            times.append(time.perf_counter() - began_s)
        return statistics.median(times) / 2

    def _tell(self, target: int, kind: _Kind, number: int) -> None:
        self._inboxes[target].send(_MESSAGE.pack(kind, self._index, number))

    def _wait(self) -> None:
        self._inboxes[self._index].receive()

    def _staging(self, worker: int, number: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        return np.frombuffer(self._shared.staging(worker, number % STAGING_BUFFERS), dtype=np.uint8)

    def _piece(self, number: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        if not self._private.size:
            self._private = np.ones(_PIECES * _PIECE_BYTES, dtype=np.uint8)
        return self._private[number * _PIECE_BYTES : (number + 1) * _PIECE_BYTES]


def _fork(index: int, inboxes: Sequence[Inbox], shared: SharedMemory, results: Inbox) -> int:
    parent = os.getpid()
    if pid := os.fork():
        return pid
    status = 1
    try:
        die_with_parent(parent_pid=parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
        os.nice(_NICE)
        _Worker(index, inboxes, shared, results).run()
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    request = json.loads(sys.argv[1])
    pairs: list[tuple[str, str]] = [(a, b) for a, b in request["pairs"]]
    index_of = {name: index for index, name in enumerate(dict.fromkeys(name for pair in pairs for name in pair))}
    shared = SharedMemory(
        SharedSizes(
            num_workers=len(index_of),
            max_num_seqs=1,
            max_blocks_per_seq=1,
            hidden_bytes_per_token=1,
            max_num_batched_tokens=1,
            outbox_slots=1,
            staging_bytes=_PIECE_BYTES,
        )
    )
    inboxes, results = tuple(Inbox() for _ in index_of), Inbox()
    pids = [_fork(index, inboxes, shared, results) for index in index_of.values()]
    for a, b in pairs:
        inboxes[index_of[a]].send(_MESSAGE.pack(_Kind.MEASURE, -1, index_of[b]))
        rate, latency_s = _RESULT.unpack(results.receive())
        print(json.dumps({"a": a, "b": b, "bandwidth_bytes_per_s": rate, "latency_s": latency_s}), flush=True)
    for inbox in inboxes:
        inbox.send(_MESSAGE.pack(_Kind.EXIT, -1, 0))
    for pid in pids:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
