"""A helper process that reads the weights of a layer, so that no Python of it runs beside the steps.

It is forked from the process that runs steps once, before requests are served: it knows the model, its configuration
and its place in the tensor-parallel group, and has its own interpreter. It has the engine's own code fill a layer,
straight into shared memory, and hands that over. It never touches a GPU.
"""

import array
import json
import mmap
import os
import re
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from flexpiped_served.processes import die_with_parent

_ALIGNMENT = 64
_NICE = 19
_HEADER = struct.Struct("<I")
_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
}  # fmt: skip

Manifest = list[tuple[str, int, list[int], str]]  # of each parameter: name, where it begins, shape, type


class HelperFailed(Exception):
    """The helper could not load a layer; the message says why."""


class WeightHelper:
    """The worker's side: one request at a time.

    Args:
        load: Called in the helper with a layer: returns shared memory with its weights, and what lies where in it.
        let_go: Called in the helper: drops the weights and KV caches that the fork has inherited.
    """

    def __init__(self, load: Callable[[int], tuple[int, Manifest]], *, let_go: Callable[[], None]) -> None:
        ours, theirs = socket.socketpair()
        worker_pid = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _serve(theirs, load, let_go, worker_pid=worker_pid)
        theirs.close()
        self._socket = ours

    def load(self, index: int) -> dict[str, torch.Tensor]:
        """Return the parameters of a layer by name, in memory that belongs to nobody else.

        Raises:
            HelperFailed
        """
        self._socket.sendall(_HEADER.pack(index))
        raw, fds, _, _ = socket.recv_fds(self._socket, _HEADER.size, 1)
        if len(raw) < _HEADER.size:
            raise HelperFailed("the process that reads weights has ended")
        manifest = json.loads(_receive(self._socket, _HEADER.unpack(raw)[0]))
        if not fds:
            raise HelperFailed(manifest["error"])
        with os.fdopen(fds[0], "r+b") as file:
            pages = mmap.mmap(file.fileno(), 0)
        return {
            name: _view(pages, start, shape, getattr(torch, dtype)) for name, start, shape, dtype in manifest["tensors"]
        }


def _view(pages: mmap.mmap, start: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    count = 1
    for size in shape:
        count *= size
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=start).view(shape)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise HelperFailed("the process that reads weights has ended")
        data += part
    return data


# --- in the helper ---


def _serve(
    connection: socket.socket,
    load: Callable[[int], tuple[int, Manifest]],
    let_go: Callable[[], None],
    *,
    worker_pid: int,
) -> None:
    """Answer until the worker closes the connection or ends; never returns."""
    status = 1
    try:
        die_with_parent(parent_pid=worker_pid)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.nice(_NICE)
        torch._C.set_num_threads(1)  # the worker's thread pool does not exist here; vLLM replaces torch's function
        let_go()
        while len(raw := connection.recv(_HEADER.size)) == _HEADER.size:
            _answer(connection, load, _HEADER.unpack(raw)[0])
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def _answer(connection: socket.socket, load: Callable[[int], tuple[int, Manifest]], index: int) -> None:
    fds: list[int] = []
    try:
        fd, tensors = load(index)
        fds.append(fd)
        manifest: dict[str, Any] = {"tensors": tensors}
    except Exception as error:  # noqa: BLE001  whatever a model's own loading raises is told to the worker
        traceback.print_exc()
        manifest = {"error": f"{type(error).__name__}: {error}"}
    body = json.dumps(manifest).encode()
    connection.sendmsg(
        [_HEADER.pack(len(body))],
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [],
    )
    connection.sendall(body)
    for fd in fds:
        os.close(fd)


def lay_out(parameters: Mapping[str, tuple[torch.Size, torch.dtype]]) -> tuple[int, Manifest, dict[str, torch.Tensor]]:
    """Return shared memory for parameters of these shapes and types, what lies where, and tensors in it."""
    tensors: Manifest = []
    end = 0
    for name, (shape, dtype) in parameters.items():
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + shape.numel() * dtype.itemsize
        tensors.append((name, start, list(shape), str(dtype).removeprefix("torch.")))
    fd = os.memfd_create("flexpiped-layer")
    os.ftruncate(fd, max(1, end))
    pages = mmap.mmap(fd, max(1, end))
    views = {name: _view(pages, start, shape, parameters[name][1]) for name, start, shape, _ in tensors}
    return fd, tensors, views


def layer_pattern(prefix: str, index: int) -> re.Pattern[str]:
    """Return what the names of a layer's tensors match; ``prefix`` is that of all layers, as ``model.layers``."""
    return re.compile(rf"(^|\.){re.escape(prefix.rpartition('.')[2])}\.{index}\.")


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
