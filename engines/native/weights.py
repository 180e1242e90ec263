"""Weights mapped from a checkpoint's files, so that the page cache is the host-memory parameter cache."""

import ctypes
import mmap
import threading
from collections.abc import Iterable
from pathlib import Path

import torch

from engines.checkpoint import Checkpoint, TensorEntry

_MADV_POPULATE_READ = 22
_POPULATE_BYTES = 4 << 20
_libc = ctypes.CDLL(None, use_errno=True)

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _File:
    """One mapped file. Private and writable only so that torch accepts the buffer; nobody writes."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)


class WeightFiles:
    """Reads tensors of a checkpoint by name. One instance per worker."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._files: dict[Path, _File] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, as a view of the mapped file where dtype and alignment allow, else as a private copy."""
        entry = self._checkpoint.tensors[name]
        file = self._file(entry)
        stored = TORCH_DTYPES[entry.dtype]
        raw = file.bytes[entry.start : entry.end]
        if entry.start % stored.itemsize:
            raw = raw.clone()
        return raw.view(stored).view(entry.shape).to(self._dtype)

    def populate(self, names: Iterable[str], cancelled: threading.Event) -> None:
        """Fault the named tensors in. Runs beside the interpreter: each call releases it."""
        for name in names:
            entry = self._checkpoint.tensors[name]
            start, end = _outer_pages(entry)
            address = self._file(entry).bytes.data_ptr()
            for offset in range(start, end, _POPULATE_BYTES):
                if cancelled.is_set():
                    return
                length = min(_POPULATE_BYTES, end - offset)
                # An old kernel refuses; the first use then faults the pages in.
                _libc.madvise(ctypes.c_void_p(address + offset), ctypes.c_size_t(length), _MADV_POPULATE_READ)

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
