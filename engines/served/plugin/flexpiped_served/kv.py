"""KV caches as one tensor per layer, and what a handover does with them: gather, scatter, compare.

vLLM allocates one backing buffer for all layers of a rank, of which nothing can be given back. Before the first request
each layer gets memory of its own instead: pages that are mapped when they are first written and unmapped as a whole.
"""

import mmap
import zlib
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True, slots=True)
class CacheForm:
    """What a KV cache looks like: its shape, the order of its dimensions in memory, its type and device."""

    shape: tuple[int, ...]
    order: tuple[int, ...]  # dimensions, the slowest first
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(cache: torch.Tensor) -> "CacheForm":
        order = tuple(sorted(range(cache.dim()), key=cache.stride, reverse=True))
        return CacheForm(tuple(cache.shape), order, cache.dtype, cache.device)

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def allocate(self) -> torch.Tensor:
        """Return zeroed memory of this form, given back when the tensor is dropped."""
        if self.device.type == "cpu":
            pages = mmap.mmap(-1, max(1, self.num_bytes))
            flat = torch.frombuffer(pages, dtype=self.dtype, count=prod(self.shape))
        else:  # not yet run on a GPU
            flat = torch.zeros(prod(self.shape), dtype=self.dtype, device=self.device)
        inverse = [self.order.index(dim) for dim in range(len(self.shape))]
        return flat.view([self.shape[dim] for dim in self.order]).permute(inverse)


class BlockView:
    """One layer's KV cache, addressed by the scheduler's KV block ids."""

    def __init__(self, cache: torch.Tensor, num_blocks: int) -> None:
        self.cache = cache
        self._per_block = cache.shape[0] // num_blocks  # kernels may cut a KV block into several
        self.block_bytes = self._per_block * cache[0].numel() * cache.element_size()
        self._shape = (self._per_block, *cache.shape[1:])

    def rows(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return the rows of the cache that hold these KV blocks."""
        if self._per_block == 1:
            return blocks
        return (blocks[:, None] * self._per_block + torch.arange(self._per_block)).flatten()

    def gather(self, blocks: torch.Tensor, into: torch.Tensor) -> None:
        """Copy KV blocks into ``into`` (bytes, one KV block after the other)."""
        rows = self.rows(blocks)
        out = into.view(self.cache.dtype).view(len(rows), *self.cache.shape[1:])
        if self.cache.device.type == "cpu":
            torch.index_select(self.cache, 0, rows, out=out)
        else:  # not yet run on a GPU
            out.copy_(self.cache.index_select(0, rows.to(self.cache.device)))

    def scatter(self, blocks: torch.Tensor, data: torch.Tensor) -> None:
        """Copy what ``gather`` made to where these KV blocks lie."""
        rows = self.rows(blocks)
        values = data.view(self.cache.dtype).view(len(rows), *self.cache.shape[1:])
        self.cache.index_copy_(0, rows.to(self.cache.device), values.to(self.cache.device))

    def checksums(self, blocks: torch.Tensor) -> list[int]:
        """Return a checksum of each KV block."""
        data = torch.empty(len(blocks) * self.block_bytes, dtype=torch.uint8)
        self.gather(blocks, data)
        raw = memoryview(data.numpy())
        return [zlib.crc32(raw[i * self.block_bytes : (i + 1) * self.block_bytes]) for i in range(len(blocks))]
