"""The tensors of a checkpoint by the layers that they belong to: those of one, or all but those of some."""

import json
import mmap
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
}  # fmt: skip


def layer_pattern(prefix: str, index: int) -> re.Pattern[str]:
    """Return what the names of a layer's tensors match; ``prefix`` is that of all layers, as ``model.layers``."""
    return re.compile(rf"(^|\.){re.escape(prefix.rpartition('.')[2])}\.{index}\.")


def others_pattern(prefix: str, indexes: Iterable[int]) -> re.Pattern[str]:
    """Return what the names of all tensors match but those of these layers."""
    layers = "|".join(layer_pattern(prefix, index).pattern for index in indexes)
    return re.compile(rf"^(?!.*?(?:{layers}))")


def read_file(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the wanted tensors of a safetensors file, mapped: 8 bytes of length, a JSON header, then the data."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        pages = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    for name, entry in header.items():
        if name != "__metadata__" and wanted.search(name):
            start, end = entry["data_offsets"]
            raw = torch.frombuffer(pages, dtype=torch.uint8, count=end - start, offset=8 + length + start)
            dtype = _TORCH_DTYPES[entry["dtype"]]
            if (8 + length + start) % dtype.itemsize:
                raw = raw.clone()
            yield name, raw.view(dtype).view(entry["shape"])


def layer_weights(
    prefix: str, index: int, *, files: Iterable[Path] | None, read_all: Callable[[], Iterable[tuple[str, torch.Tensor]]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the checkpoint's tensors of one layer, as the engine's loader names them.

    Args:
        files: In the safetensors format; None: the checkpoint has another one.
        read_all: Returns all tensors, of which those are kept that are wanted.
    """
    wanted = layer_pattern(prefix, index)
    if files is None:
        yield from ((name, tensor) for name, tensor in read_all() if wanted.search(name))
        return
    for file in files:
        yield from read_file(file, wanted)
