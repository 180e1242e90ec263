"""The KV cache of one worker on a device with memory of its own, allocated decoder by decoder.

A decoder's cache is there from when its layer is attached until it is dropped, as large as the number of KV blocks in
force; another number means another allocation and a copy, one decoder at a time between two steps.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch


class DeviceKV:
    """A ``KVStore``. Unlike one that is mapped, it takes its memory at once, not as slots are written.

    Args:
        end_slot: Says below which token slot there is to be memory for a decoder that comes.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        num_decoders: int,
        end_slot: Callable[[], int],
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self._end_slot = end_slot
        self.row_bytes = num_kv_heads * head_dim * dtype.itemsize
        self._shape = (num_kv_heads, head_dim)
        self._none = torch.empty(0, *self._shape, dtype=dtype, device=device)
        self._keys = [self._none] * num_decoders
        self._values = [self._none] * num_decoders

    @property
    def keys(self) -> list[torch.Tensor]:
        return self._keys

    @property
    def values(self) -> list[torch.Tensor]:
        return self._values

    def hold(self, decoder: int) -> None:
        if not len(self._keys[decoder]):
            self.bound(decoder, self._end_slot())

    def bound(self, decoder: int, end_slot: int) -> int:
        before = self.mapped_bytes(decoder)
        if end_slot != len(self._keys[decoder]):
            for halves in (self._keys, self._values):  # one after the other: less memory at the same time
                halves[decoder] = self._resized(halves[decoder], end_slot)
        return max(0, before - self.mapped_bytes(decoder))

    def release(self, decoder: int) -> int:
        held = self.mapped_bytes(decoder)
        self._keys[decoder] = self._values[decoder] = self._none
        return held

    def mapped_bytes(self, decoder: int) -> int:
        return 2 * len(self._keys[decoder]) * self.row_bytes

    def read_into(self, decoders: list[int], slots: npt.NDArray[np.int32], target: memoryview) -> None:
        """Copy token slots into ``target``. The device gathers them; one copy brings all to the host."""
        at, halves = self._indices(slots), self._halves(decoders)
        gathered = self._none.new_empty(len(halves), len(slots), *self._shape)
        for half, rows in zip(halves, gathered, strict=True):
            torch.index_select(half, 0, at, out=rows)
        self._on_host(target, gathered.shape).copy_(gathered)

    def write_from(self, decoders: list[int], slots: npt.NDArray[np.int32], source: memoryview) -> None:
        """Copy token slots from ``source``: one copy to the device, which then scatters them."""
        at, halves = self._indices(slots), self._halves(decoders)
        arrived = self._on_host(source, torch.Size((len(halves), len(slots), *self._shape))).to(self._none.device)
        for half, rows in zip(halves, arrived, strict=True):
            half.index_copy_(0, at, rows)

    def move_slots(self, decoders: list[int], sources: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]) -> None:
        there, here = self._indices(targets), self._indices(sources)
        for half in self._halves(decoders):
            half.index_copy_(0, there, half.index_select(0, here))

    def slot_bytes(self, decoder: int, first_slot: int, end_slot: int) -> bytes:
        halves = [_bytes_of(half)[first_slot:end_slot].cpu().numpy() for half in self._halves([decoder])]
        return b"".join(half.tobytes() for half in halves)

    def _resized(self, half: torch.Tensor, end_slot: int) -> torch.Tensor:
        """Return a copy with so many slots. New ones are zero, as those of memory that is mapped."""
        new = torch.zeros(end_slot, *self._shape, dtype=half.dtype, device=half.device)
        kept = min(len(half), end_slot)
        new[:kept] = half[:kept]
        return new

    def _on_host(self, memory: memoryview, shape: torch.Size) -> torch.Tensor:
        return torch.frombuffer(memory, dtype=self._none.dtype, count=shape.numel()).view(shape)

    def _halves(self, decoders: list[int]) -> list[torch.Tensor]:
        return [halves[decoder] for decoder in decoders for halves in (self._keys, self._values)]

    def _indices(self, slots: npt.NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(slots.astype(np.int64)).to(self._none.device)


def _bytes_of(half: torch.Tensor) -> torch.Tensor:
    """Return a view of shape (slots, bytes), so that copies are the same for every dtype."""
    return half.view(len(half), -1).view(torch.uint8)
