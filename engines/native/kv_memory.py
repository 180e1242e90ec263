"""The KV cache of one worker: one tensor pair per decoder, in address space reserved once.

Nothing is backed by memory until a slot is written; a decoder that leaves gives its pages back by hole punching. Pages
are small ones also on a host that makes them huge by itself: a slot would take 2 MiB there, a huge page of which a part
is given back stays as a whole, and the kernel fills holes again.
"""

import ctypes
import math
import mmap
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch

_libc = ctypes.CDLL(None, use_errno=True)
_PAGE_BYTES = mmap.PAGESIZE
_MAP_NORESERVE = 0x4000  # Linux; the mmap module has no name for it before Python 3.13


def resident_bytes(address: int, num_bytes: int) -> int:
    """Return how much of an aligned mapping is backed by memory, as the kernel counts it."""
    pages = -(-num_bytes // _PAGE_BYTES)
    vector = (ctypes.c_ubyte * pages)()
    if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), vector) != 0:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(b & 1 for b in bytes(vector)) * _PAGE_BYTES


class KVMemory:
    """Keys and values of every decoder, of shape ``(num_slots, num_kv_heads, head_dim)`` each."""

    def __init__(
        self, *, num_decoders: int, num_slots: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.num_slots = num_slots
        self.row_bytes = num_kv_heads * head_dim * dtype.itemsize
        half = -(-num_slots * self.row_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self._half_bytes = half
        self._space = mmap.mmap(
            -1,
            num_decoders * 2 * half,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
        with suppress(OSError):  # a kernel that knows no huge pages
            self._space.madvise(mmap.MADV_NOHUGEPAGE)
        self._all = torch.frombuffer(self._space, dtype=torch.uint8)
        shape = (num_slots, num_kv_heads, head_dim)
        size = num_slots * self.row_bytes
        flat = [self._all[i * half : i * half + size] for i in range(2 * num_decoders)]
        self.keys = [t.view(dtype).view(shape) for t in flat[0::2]]
        self.values = [t.view(dtype).view(shape) for t in flat[1::2]]
        # Rows as plain bytes, so that copies are the same for every dtype.
        self._raw = [t.view(num_slots, self.row_bytes).numpy() for t in flat]

    def hold(self, decoder: int) -> None:
        """Nothing to do: memory comes with the first write."""

    def read_into(self, decoders: list[int], slots: npt.NDArray[np.int32], target: memoryview) -> None:
        """Copy token slots of some decoders into ``target``, decoder by decoder, keys before values.

        By numpy, on one thread: threads that wait for each other here would hold up the steps of other workers.
        """
        shape = (2 * len(decoders), len(slots), self.row_bytes)
        out = np.frombuffer(target, dtype=np.uint8, count=math.prod(shape)).reshape(shape)
        for half, rows in zip(self._halves(decoders), out, strict=True):
            half.take(slots, axis=0, out=rows, mode="clip")  # other modes copy through a buffer

    def write_from(self, decoders: list[int], slots: npt.NDArray[np.int32], source: memoryview) -> None:
        """Copy token slots that ``read_into`` has left in ``source`` into these decoders."""
        shape = (2 * len(decoders), len(slots), self.row_bytes)
        data = np.frombuffer(source, dtype=np.uint8, count=math.prod(shape)).reshape(shape)
        for half, rows in zip(self._halves(decoders), data, strict=True):
            half[slots] = rows

    def slot_bytes(self, decoder: int, first_slot: int, end_slot: int) -> bytes:
        """Return the raw keys and values of a run of slots, for checksums."""
        raw_keys, raw_values = self._halves([decoder])
        return raw_keys[first_slot:end_slot].tobytes() + raw_values[first_slot:end_slot].tobytes()

    def release(self, decoder: int) -> int:
        """Give a decoder's pages back to the system; return how many bytes were mapped."""
        mapped = self.mapped_bytes(decoder)  # without what was swapped out, which is given back as well
        self._space.madvise(mmap.MADV_DONTNEED, decoder * 2 * self._half_bytes, 2 * self._half_bytes)
        return mapped

    def bound(self, decoder: int, end_slot: int) -> int:
        """Give the pages from a token slot on back to the system; return how many bytes were mapped there."""
        offset = -(-end_slot * self.row_bytes // _PAGE_BYTES) * _PAGE_BYTES
        length, returned = self._half_bytes - offset, 0
        if length <= 0:
            return 0
        for half in (2 * decoder, 2 * decoder + 1):
            start = half * self._half_bytes + offset
            returned += resident_bytes(self._all.data_ptr() + start, length)
            self._space.madvise(mmap.MADV_DONTNEED, start, length)
        return returned

    def move_slots(self, decoders: list[int], sources: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]) -> None:
        """Copy token slots to other ones, none of which is a source."""
        for half in self._halves(decoders):
            half[targets] = half[sources]

    def mapped_bytes(self, decoder: int) -> int:
        start = self._all.data_ptr() + decoder * 2 * self._half_bytes
        return resident_bytes(start, 2 * self._half_bytes)

    def _halves(self, decoders: list[int]) -> list[npt.NDArray[np.uint8]]:
        return [self._raw[2 * d + half] for d in decoders for half in (0, 1)]
