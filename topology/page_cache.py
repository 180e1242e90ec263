"""How much of files is in the memory of this host already, as the kernel's page cache has it."""

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_WINDOW_BYTES: Final = 1 << 20
_WINDOWS: Final = 64  # of each file, evenly spread: large files are sampled, so that a look takes a millisecond


def cached_share(files: Iterable[Path]) -> float:
    """Return the share of these files that is in memory, from 0 to 1; of no bytes at all, 1."""
    total = cached = 0.0
    for file in files:
        try:
            size, share = file.stat().st_size, _share_of(file)
        except OSError:  # it went away, or may not be read
            continue
        total += size
        cached += size * share
    return cached / total if total else 1.0


def _share_of(file: Path) -> float:
    """Return the share of one file, from windows of it."""
    with file.open("rb") as opened:
        size = file.stat().st_size
        if size == 0:
            return 1.0
        # Private and writable only so that ctypes gives its address; nothing is written, and nothing read.
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            step = max(_WINDOW_BYTES, -(-size // _WINDOWS // mmap.PAGESIZE) * mmap.PAGESIZE)
            windows = [(start, min(_WINDOW_BYTES, size - start)) for start in range(0, size, step)]
            anchor = ctypes.c_char.from_buffer(mapped)
            try:
                pages = b"".join(_pages(ctypes.addressof(anchor) + start, length) for start, length in windows)
            finally:
                del anchor  # else the mapping could not be closed
    return sum(page & 1 for page in pages) / len(pages)


def _pages(address: int, length: int) -> bytes:
    vector = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), vector) != 0:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return bytes(vector)
