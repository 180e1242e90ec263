"""Keeps pieces of files in memory, so that the kernel does not give them up for others: no copy is made of them."""

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mlock.argtypes = _libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class NotPinned(Exception):
    """The kernel does not allow it; the message says why."""


class PinnedRanges:
    """Pieces of files that are in memory until ``close``. To make one reads what is not there yet, and blocks.

    Args:
        ranges: File, first byte and end of each.

    Raises:
        NotPinned: There is a limit, or a file is not there.
    """

    def __init__(self, ranges: Sequence[tuple[str, int, int]]) -> None:
        with ExitStack() as undo:
            for file, start, end in ranges:
                _pin(undo, file, start // mmap.PAGESIZE * mmap.PAGESIZE, end)
            self._held = undo.pop_all()

    def close(self) -> None:
        """Let go; the pages stay for as long as the kernel has no better use for them. Idempotent."""
        self._held.close()


def _pin(undo: ExitStack, file: str, start: int, end: int) -> None:
    # Python's own mapping would have to be private and writable to give its address: locked, that is a copy.
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NotPinned(f"{file}: {error.strerror}") from None
    try:
        address = _libc.mmap(None, end - start, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    finally:
        os.close(descriptor)
    if address == _MAP_FAILED:
        raise NotPinned(f"{file}: {os.strerror(ctypes.get_errno())}")
    undo.callback(_libc.munmap, address, end - start)
    if _libc.mlock(address, end - start) != 0:
        raise NotPinned(f"locked memory is limited (ulimit -l; LimitMEMLOCK= of a unit): {_reason()}")


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
