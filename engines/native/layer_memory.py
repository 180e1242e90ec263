"""Parameters of a layer in memory that processes share: eight bytes of length, a JSON header, then the tensors.

The header says of each tensor where it begins after it, its shape and its type, as ``torch`` calls it. The memory is
sealed once it is filled: whoever maps it reads the same for ever.
"""

import fcntl
import json
import mmap
import os
import struct
from collections.abc import Mapping
from typing import Any, Final

import torch

_LENGTH: Final = struct.Struct("<Q")
_ALIGNMENT: Final = 64
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def fill(name: str, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype) -> int:
    """Return a descriptor of memory that has these tensors as ``dtype``. It belongs to the caller.

    Raises:
        OSError: There is no memory.
    """
    places: dict[str, tuple[int, list[int], str]] = {}
    end = 0
    for each, tensor in tensors.items():
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        places[each] = (start, list(tensor.shape), str(dtype).removeprefix("torch."))
        end = start + tensor.numel() * dtype.itemsize
    header = json.dumps(places).encode()
    begin = _begin(len(header))
    descriptor = os.memfd_create(f"flexpiped-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, begin + end)
        with mmap.mmap(descriptor, begin + end) as pages:
            pages[: _LENGTH.size + len(header)] = _LENGTH.pack(len(header)) + header
            for each, view in _views(pages, places, begin).items():
                view.copy_(tensors[each])
            del view  # else the mapping could not be closed
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def mapped(descriptor: int) -> dict[str, torch.Tensor]:
    """Return the tensors in such memory, mapped. They keep it by themselves: the descriptor may be closed."""
    size = os.fstat(descriptor).st_size
    # Private and writable only so that torch accepts the buffer; nobody writes.
    pages = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    (length,) = _LENGTH.unpack(pages[: _LENGTH.size])
    return _views(pages, json.loads(pages[_LENGTH.size : _LENGTH.size + length]), _begin(length))


def _begin(header_bytes: int) -> int:
    return -(-(_LENGTH.size + header_bytes) // _ALIGNMENT) * _ALIGNMENT


def _views(pages: mmap.mmap, places: Mapping[str, Any], begin: int) -> dict[str, torch.Tensor]:
    found = {}
    for name, (start, shape, kind) in places.items():
        dtype = getattr(torch, kind)
        count = torch.Size(shape).numel()
        flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=begin + start) if count else torch.empty(0)
        found[name] = flat.to(dtype).view(shape)
    return found
