"""A worker's part of a change of the number of KV blocks: copies below the bound, memory up to it and none above."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from engines.native.kv_store import KVStore
from engines.native.messages import BoundKv, MoveKv


class KvBound:
    """Knows up to which token slot the KV cache is in use, which is ``end_slot`` to begin with."""

    def __init__(self, kv: KVStore, *, kv_block_tokens: int, end_slot: int) -> None:
        self._kv = kv
        self._kv_block_tokens = kv_block_tokens
        self._end_slot = end_slot

    def move(self, message: MoveKv, decoders: Sequence[int]) -> None:
        """Copy KV blocks to others, in these decoders."""
        sources, targets = (self._slots_of(blocks) for blocks in (message.sources, message.targets))
        self._kv.move_slots(list(decoders), sources, targets)

    def slices(
        self, message: BoundKv, decoders: Sequence[int], *, tell: Callable[[int], None]
    ) -> Iterator[Callable[[], None]]:
        """Take a bound over, and yield the work that follows from it, decoder by decoder; ``tell`` gets the bytes.

        A slice goes by the bound of its moment: that may have risen, and what is written since must stay.
        """
        self._end_slot = message.end_slot
        returned = [0]

        def release(decoder: int) -> None:
            returned[0] += self._kv.bound(decoder, self._end_slot)

        for decoder in decoders:
            yield partial(release, decoder)
        yield lambda: tell(returned[0])

    def _slots_of(self, blocks: bytes) -> npt.NDArray[np.int32]:
        first = np.frombuffer(blocks, dtype=np.int32)[:, None] * self._kv_block_tokens
        return (first + np.arange(self._kv_block_tokens)).ravel().astype(np.int32)
