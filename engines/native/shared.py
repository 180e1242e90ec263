"""Host shared memory of one engine: made by the core before it forks, inherited by every worker.

This is the channel of the CPU: no connection is made when a layout changes, because all of it exists from the start.
Pages are mapped when first touched, so areas that no layout uses cost nothing.
"""

import mmap
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engines.native.token_mask import words_for

STAGING_BUFFERS = 4  # per worker: so many pieces of a KV copy may be under way, hence run between two steps


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSizes:
    """What has to fit."""

    num_workers: int
    max_num_seqs: int
    max_blocks_per_seq: int
    hidden_bytes_per_token: int
    max_num_batched_tokens: int
    outbox_slots: int  # micro-batches in flight at most
    staging_bytes: int
    max_model_len: int = 0
    vocab_size: int = 0


class SharedMemory:
    """One hidden-state outbox and one KV staging area per worker, and what the core writes and all read.

    That has one row for each running sequence: the block table, and, for those of which the stage that samples needs
    them, the tokens so far, a mask of the tokens that may be chosen and what is added to their logits.
    """

    def __init__(self, sizes: SharedSizes) -> None:
        self.sizes = sizes
        rows, columns = sizes.max_num_seqs, sizes.max_blocks_per_seq
        self.block_table = _shared_rows(rows, columns)
        self.tokens = _shared_rows(rows, sizes.max_model_len)
        self.masks = _shared_rows(rows, words_for(sizes.vocab_size))
        self.biases = _shared_rows(rows, sizes.vocab_size).view(np.float32)
        self._kv_end_slot = _shared_rows(1, 1)
        self._slot_bytes = sizes.max_num_batched_tokens * sizes.hidden_bytes_per_token
        self._outboxes = [mmap.mmap(-1, self._slot_bytes * sizes.outbox_slots) for _ in range(sizes.num_workers)]
        self._staging = [mmap.mmap(-1, sizes.staging_bytes * STAGING_BUFFERS) for _ in range(sizes.num_workers)]

    @property
    def kv_end_slot(self) -> int:
        """Below this token slot the KV cache of a layer that comes has memory. The core sets it."""
        return int(self._kv_end_slot[0, 0])

    @kv_end_slot.setter
    def kv_end_slot(self, value: int) -> None:
        self._kv_end_slot[0, 0] = value

    @property
    def areas(self) -> list[memoryview]:
        """All outboxes and staging areas: what a device copies from and to."""
        return [memoryview(each) for each in (*self._outboxes, *self._staging)]

    def outbox(self, worker: int, step_id: int) -> memoryview:
        """Return the bytes in which ``worker`` leaves the hidden states of a step."""
        start = (step_id % self.sizes.outbox_slots) * self._slot_bytes
        return memoryview(self._outboxes[worker])[start : start + self._slot_bytes]

    def staging(self, worker: int, buffer: int) -> memoryview:
        """Return one KV staging buffer of ``worker``."""
        start = buffer * self.sizes.staging_bytes
        return memoryview(self._staging[worker])[start : start + self.sizes.staging_bytes]


def _shared_rows(rows: int, columns: int) -> npt.NDArray[np.int32]:
    memory = mmap.mmap(-1, max(rows * columns * 4, 1))  # the array keeps it
    return np.frombuffer(memory, dtype=np.int32, count=rows * columns).reshape(rows, columns)
