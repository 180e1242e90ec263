"""A request's KV cache in shared memory: one file per layer and tensor-parallel rank, KV block after KV block.

Each layer lies in a file of its own, so that the vLLM that takes the request over may hold it on another rank.
"""

import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flexpiped_served.kv import BlockView


class KvFiles:
    """The layers of one worker, written to files by one vLLM and loaded by another.

    Args:
        context: vLLM's modules by name; those with a KV cache count, whichever they are now.
        num_blocks: Of the KV cache.
        share: Which tensor-parallel share this worker has.
    """

    def __init__(self, context: Mapping[str, Any], *, num_blocks: int, share: int) -> None:
        self._context = context
        self._num_blocks = num_blocks
        self._share = share
        self._mapped: dict[Path, dict[str, torch.Tensor]] = {}  # by directory and layer

    @property
    def form(self) -> str:
        """What a KV block of one layer is, in words: equal words are bytes that mean the same."""
        for name, view in self._views().items():
            cache = view.cache
            order = sorted(range(1, cache.dim()), key=cache.stride, reverse=True)
            kernel = getattr(self._context[name], "isa", "")  # the CPU's kernels each have their own packing
            return f"{view.block_bytes} bytes of {cache.dtype} {tuple(cache.shape[1:])} {order} {kernel}".strip()
        return ""

    @property
    def layers(self) -> int:
        return len(self._views())

    @property
    def block_bytes(self) -> int:
        """Of one KV block in all layers of this worker."""
        return sum(view.block_bytes for view in self._views().values())

    def write(self, directory: Path, *, start: int, blocks: Sequence[int], total: int) -> None:
        """Write these KV blocks as number ``start`` and on of ``total``. Room for them is reserved first.

        Raises:
            OSError: There is no room in shared memory.
        """
        ids = torch.tensor(blocks, dtype=torch.int64)
        for name, view in self._views().items():
            size, at = view.block_bytes, start * view.block_bytes
            with self._path(directory, name).open("a+b") as file:  # made once, never cut
                os.posix_fallocate(file.fileno(), at, len(blocks) * size)  # a page that cannot be had would kill us
                if start + len(blocks) == total:
                    os.ftruncate(file.fileno(), total * size)
                with mmap.mmap(file.fileno(), 0) as pages:
                    _gather(view, ids, pages, at)

    def open(self, directory: Path, *, total: int) -> None:
        """Map the files of this worker's layers, with ``total`` KV blocks each.

        Raises:
            OSError, ValueError: A file is missing, or is not as long as it must be.
        """
        mapped: dict[str, torch.Tensor] = {}
        for name, view in self._views().items():
            with self._path(directory, name).open("r+b") as file:
                there, wanted = os.fstat(file.fileno()).st_size, total * view.block_bytes
                if there != wanted:
                    raise ValueError(f"KV cache of {name}: {there} bytes instead of {wanted}")
                mapped[name] = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
        self._mapped[directory] = mapped

    def load(self, directory: Path, *, first: int, blocks: Sequence[int]) -> None:
        """Copy KV blocks number ``first`` and on into ``blocks`` of each layer."""
        ids, mapped = torch.tensor(blocks, dtype=torch.int64), self._mapped[directory]
        for name, view in self._views().items():
            at, length = first * view.block_bytes, len(blocks) * view.block_bytes
            view.scatter(ids, mapped[name][at : at + length])

    def close(self, directory: Path) -> None:
        """Forget the files in ``directory``. Idempotent."""
        self._mapped.pop(directory, None)

    def _path(self, directory: Path, name: str) -> Path:
        return directory / f"{name}.{self._share}"

    def _views(self) -> dict[str, BlockView]:
        caches = {name: getattr(module, "kv_cache", None) for name, module in self._context.items()}
        return {
            name: BlockView(cache, self._num_blocks)
            for name, cache in caches.items()
            if isinstance(cache, torch.Tensor) and cache.numel()
        }


def _gather(view: BlockView, ids: torch.Tensor, pages: mmap.mmap, at: int) -> None:
    """Gather into a part of ``pages``. No tensor over them outlives this: an open one would keep them mapped."""
    into = torch.frombuffer(pages, dtype=torch.uint8)[at : at + len(ids) * view.block_bytes]
    view.gather(ids, into)
