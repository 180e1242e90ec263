"""What a worker needs of its KV cache, wherever that lies."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


class KVStore(Protocol):
    """Keys and values of every decoder, of shape ``(token slots, num_kv_heads, head_dim)`` each.

    Only those of decoders that are held may be used.
    """

    row_bytes: int  # of the keys, or the values, of one token slot in one decoder

    @property
    def keys(self) -> Sequence[torch.Tensor]: ...

    @property
    def values(self) -> Sequence[torch.Tensor]: ...

    def hold(self, decoder: int) -> None:
        """Have memory for a decoder's token slots, or address space that gets it when they are written."""

    def bound(self, decoder: int, end_slot: int) -> int:
        """Have memory below ``end_slot`` and none above, keeping what is below; return the bytes given back."""

    def release(self, decoder: int) -> int:
        """Hold a decoder no longer; return the bytes given back."""

    def mapped_bytes(self, decoder: int) -> int:
        """Return how much memory a decoder takes."""

    def read_into(self, decoders: list[int], slots: npt.NDArray[np.int32], target: memoryview) -> None:
        """Copy token slots of some decoders into ``target``, decoder by decoder, keys before values."""

    def write_from(self, decoders: list[int], slots: npt.NDArray[np.int32], source: memoryview) -> None:
        """Copy token slots that ``read_into`` has left in ``source`` into these decoders."""

    def move_slots(self, decoders: list[int], sources: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]) -> None:
        """Copy token slots to other ones, none of which is a source."""

    def slot_bytes(self, decoder: int, first_slot: int, end_slot: int) -> bytes:
        """Return the raw keys and values of a run of slots, for checksums."""
