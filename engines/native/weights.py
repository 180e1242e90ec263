"""Weights mapped from a checkpoint's files: the kernel's page cache has the only copy."""

import ctypes
import mmap
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from engines.checkpoint import Checkpoint, TensorEntry

_MADV_POPULATE_READ = 22
_POPULATE_BYTES = 4 << 20
_FEW = 16  # in so many bytes one
_libc = ctypes.CDLL(None, use_errno=True)

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _File:
    """One mapped file. Private and writable only so that torch accepts the buffer; nobody writes."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            at = os.fstat(file.fileno())
        self.identity = (at.st_dev, at.st_ino, at.st_mtime_ns, at.st_size)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)


class WeightFiles:
    """Reads tensors of a checkpoint by name. One instance per worker."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self.dtype = dtype
        self._files: dict[Path, _File] = {}

    def tensor(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor, as a view of the mapped file where dtype and alignment allow, else as a private copy.

        Args:
            dtype: Of the result; None: that which is computed with.
        """
        return self._as_stored(name).to(dtype or self.dtype)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the type that a tensor has in its file."""
        return TORCH_DTYPES[self._checkpoint.tensors[name].dtype]

    def stored(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Return tensors as they are stored, under other names: of ``names``, the checkpoint's are the values."""
        return {full: self._as_stored(stored) for full, stored in names.items()}

    def _as_stored(self, name: str) -> torch.Tensor:
        entry = self._checkpoint.tensors[name]
        stored = TORCH_DTYPES[entry.dtype]
        raw = self._file(entry).bytes[entry.start : entry.end]
        if entry.start % stored.itemsize:
            raw = raw.clone()
        return raw.view(stored).view(entry.shape)

    def are_as_stored(self, names: Mapping[str, str], dtypes: Mapping[str, torch.dtype]) -> bool:
        """Say whether these tensors, of which ``dtypes`` are wanted, are views of the files but for a few small ones.

        Beside matrices that stay as they are, a copy of norms and biases is not worth keeping for others.
        """
        copied = total = 0
        for full, stored in names.items():
            entry = self._checkpoint.tensors[stored]
            total += entry.end - entry.start
            if self.stored_dtype(stored) is not dtypes[full] or entry.start % dtypes[full].itemsize:
                copied += entry.end - entry.start
        return copied * _FEW <= total

    def identity(self, name: str) -> tuple[object, ...]:
        """Return what tells a tensor from all others of this host, and from what its file had before."""
        entry = self._checkpoint.tensors[name]
        file = self._file(entry)
        return (*file.identity, entry.start, entry.end)

    def ranges(self, names: Iterable[str]) -> list[tuple[str, int, int]]:
        """Return where these tensors lie, as (file, first byte, end): neighbours, and what overlaps, are one."""
        directory, found = self._checkpoint.directory, list[tuple[str, int, int]]()
        entries = {self._checkpoint.tensors[name] for name in names}
        for file, start, end in sorted((str(directory / each.file), each.start, each.end) for each in entries):
            if found and found[-1][0] == file and start <= found[-1][2]:
                found[-1] = (file, found[-1][1], max(end, found[-1][2]))
            else:
                found.append((file, start, end))
        return found

    def populate(self, names: Iterable[str], cancelled: threading.Event) -> None:
        """Fault the named tensors in. Runs beside the interpreter: each call releases it."""
        for name in names:
            entry = self._checkpoint.tensors[name]
            start, end = _outer_pages(entry)
            populate(self._file(entry).bytes.data_ptr() + start, end - start, cancelled)

    def release(self, names: Iterable[str]) -> int:
        """Unmap the pages that belong to the named tensors alone; return their bytes. They stay in the page cache."""
        returned = 0
        for name in names:
            entry = self._checkpoint.tensors[name]
            returned += entry.end - entry.start
            start = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
            end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                self._file(entry).map.madvise(mmap.MADV_DONTNEED, start, end - start)
        return returned

    def _file(self, entry: TensorEntry) -> _File:
        path = self._checkpoint.directory / entry.file
        if path not in self._files:
            self._files[path] = _File(path)
        return self._files[path]


def _outer_pages(entry: TensorEntry) -> tuple[int, int]:
    return entry.start // mmap.PAGESIZE * mmap.PAGESIZE, entry.end


def populate(address: int, num_bytes: int, cancelled: threading.Event) -> None:
    """Fault mapped memory in, a piece at a time, until ``cancelled``."""
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    end = address + num_bytes
    for piece in range(first, end, _POPULATE_BYTES):
        if cancelled.is_set():
            return
        length = min(_POPULATE_BYTES, end - piece)
        # An old kernel refuses; the first use then faults the pages in.
        _libc.madvise(ctypes.c_void_p(piece), ctypes.c_size_t(length), _MADV_POPULATE_READ)
