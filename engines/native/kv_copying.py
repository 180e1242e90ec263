"""A worker's part in the sync of a handover: KV cache out to shared memory and in from there, and its checksums."""

import time
import zlib
from collections.abc import Callable

import numpy as np

from engines.failpoints import Failpoints
from engines.native import messages as m
from engines.native.kv_store import KVStore
from engines.native.shared import SharedMemory


class KvCopying:
    """Used on the worker's main thread; each copy is as small as the core makes it.

    Args:
        tell: Tells another worker, by its number.
        report: Tells the core.
    """

    def __init__(
        self,
        kv: KVStore,
        shared: SharedMemory,
        failpoints: Failpoints,
        *,
        worker: int,
        tell: Callable[[int, m.CopyIn], None],
        report: Callable[[m.Copied], None],
    ) -> None:
        self._kv = kv
        self._shared = shared
        self._failpoints = failpoints
        self._worker = worker
        self._tell = tell
        self._report = report

    def copy_out(self, message: m.CopyOut) -> None:
        """Put token slots where the worker that gets them finds them, and tell it."""
        if self._failpoints.hit("worker.copy_out"):
            self._report(m.Copied(worker=self._worker, handover=message.handover, ticket=message.ticket, busy_s=0.0))
            return
        started = time.thread_time()
        slots = np.frombuffer(message.slots, dtype=np.int32)
        self._kv.read_into(message.decoders, slots, self._shared.staging(self._worker, message.buffer))
        note = m.CopyIn(
            handover=message.handover,
            ticket=message.ticket,
            source=self._worker,
            buffer=message.buffer,
            decoders=message.decoders,
            slots=message.slots,
            busy_s=time.thread_time() - started,
        )
        self._tell(message.target, note)

    def copy_in(self, message: m.CopyIn) -> None:
        """Take in what another worker has put there, and report the time that both took."""
        self._failpoints.hit("worker.copy_in")
        started = time.thread_time()
        slots = np.frombuffer(message.slots, dtype=np.int32)
        self._kv.write_from(message.decoders, slots, self._shared.staging(message.source, message.buffer))
        busy_s = message.busy_s + time.thread_time() - started
        self._report(m.Copied(worker=self._worker, handover=message.handover, ticket=message.ticket, busy_s=busy_s))


def checksums_of(kv: KVStore, message: m.Checksum, *, kv_block_tokens: int) -> list[int]:
    """Return those of KV blocks as far as they are valid, decoders outermost."""
    return [
        zlib.crc32(kv.slot_bytes(decoder, block * kv_block_tokens, block * kv_block_tokens + valid))
        for decoder in message.decoders
        for block, valid in message.blocks
    ]
