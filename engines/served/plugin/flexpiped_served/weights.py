"""A helper process that reads the weights of a layer, so that no Python of it runs beside the steps.

It is forked from the process that runs steps before requests are served, and again only where it has died: it knows
the model, its configuration and its place in the tensor-parallel group, and has its own interpreter. It has the
engine's own code fill a layer, straight into shared memory, and hands that over; or the memory of one that was kept
(``keeping``). It never touches a GPU.

Such memory says itself what lies in it: eight bytes of length, a JSON header, then the parameters.
"""

import array
import fcntl
import json
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import torch

from flexpiped_served.processes import die_with_parent

_ALIGNMENT = 64
_NICE = 19
_ENDED = "the process that reads weights has ended"
_HEADER = struct.Struct("<I")
_REQUEST = struct.Struct("<i")  # a layer that is wanted; its complement: one that the worker has let go of
_KEEPER = -(1 << 31)  # in place of a layer; the address of a keeper follows, after its length
_LENGTH = struct.Struct("<Q")

Manifest = list[tuple[str, int, list[int], str]]  # of each parameter: name, where it begins, shape, type


class HelperFailed(Exception):
    """The helper could not load a layer; the message says why."""


class _HelperDied(HelperFailed):
    """Its end of the connection is closed."""


class Loader(Protocol):
    """What the helper has layers from."""

    def load(self, index: int) -> tuple[int, Manifest]:
        """Return shared memory with a layer's weights, and what lies where in it."""

    def left(self, index: int) -> None:
        """The worker has let go of a layer."""

    def keep_at(self, address: str) -> None:
        """Another keeper keeps what is loaded from here on; empty: none does."""

    def forked(self) -> None:
        """This is the helper from now on; what was loaded before is the worker's."""


class WeightHelper:
    """The worker's side: one request at a time, whichever thread asks. Made in the main thread.

    Args:
        loader: Called in the helper.
        let_go: Called in the helper: drops the weights and KV caches that the fork has inherited.
    """

    def __init__(self, loader: Loader, *, let_go: Callable[[], None]) -> None:
        self._loader, self._let_go = loader, let_go
        self._asking = threading.Lock()
        # Of which a helper is forked that replaces another: it would end with the thread that asks, as a move's does.
        self._lasting = ThreadPoolExecutor(1, thread_name_prefix="flexpiped-forks")
        self._fork()

    def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        worker_pid = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _serve(theirs, self._loader, self._let_go, worker_pid=worker_pid)
        theirs.close()
        self._socket = ours

    def load(self, index: int) -> dict[str, torch.Tensor]:
        """Return the parameters of a layer by name. Whoever writes to them writes to memory of its own.

        A helper that has died, as by the kernel's choice when memory was short, is replaced once.

        Raises:
            HelperFailed
        """
        with self._asking:  # a move that was called off may still wait for its layer
            try:
                return self._ask(index)
            except _HelperDied:
                self._end()
                self._lasting.submit(self._fork).result()
                return self._ask(index)

    def close(self) -> None:
        """Have it end, and return when it has."""
        self._end()
        self._lasting.shutdown()

    def _end(self) -> None:
        self._socket.close()
        with suppress(ChildProcessError):  # somebody else has taken notice of its end
            os.waitpid(self.pid, 0)

    def _ask(self, index: int) -> dict[str, torch.Tensor]:
        try:
            self._socket.sendall(_REQUEST.pack(index))
            raw, fds, _, _ = socket.recv_fds(self._socket, _HEADER.size, 1)
        except ConnectionError as error:
            raise _HelperDied(_ENDED) from error
        if len(raw) < _HEADER.size:
            raise _HelperDied(_ENDED)
        manifest = json.loads(_receive(self._socket, _HEADER.unpack(raw)[0]))
        if not fds:
            raise HelperFailed(manifest["error"])
        return mapped(fds[0], manifest["tensors"])

    def left(self, index: int) -> None:
        """Say that this worker has let go of a layer. Never waits, and may come while a layer is loaded."""
        self._loader.left(index)  # one that it began with
        with suppress(OSError):  # a helper that has ended has none
            self._socket.sendall(_REQUEST.pack(~index))

    def keep_at(self, address: str) -> None:
        """Have another keeper keep layers. Never waits, and may come while a layer is loaded."""
        self._loader.keep_at(address)  # for a helper that is forked later
        body = address.encode()
        with suppress(OSError):
            self._socket.sendall(_REQUEST.pack(_KEEPER) + _HEADER.pack(len(body)) + body)


def mapped(fd: int, tensors: Manifest) -> dict[str, torch.Tensor]:
    """Return the parameters in shared memory by name; they keep it, and ``fd`` is closed.

    Memory that is sealed others have, too: whoever writes to it gets a copy of what is written to.
    """
    try:
        is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
        pages = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE if is_sealed else mmap.MAP_SHARED)
    finally:
        os.close(fd)
    return {name: _view(pages, start, shape, getattr(torch, dtype)) for name, start, shape, dtype in tensors}


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
            raise _HelperDied(_ENDED)
        data += part
    return data


# --- in the helper ---


def _serve(
    connection: socket.socket,
    loader: Loader,
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
        loader.forked()
        let_go()
        while len(raw := connection.recv(_REQUEST.size)) == _REQUEST.size:
            (index,) = _REQUEST.unpack(raw)
            if index >= 0:
                _answer(connection, loader, index)
            elif index == _KEEPER:
                length = _HEADER.unpack(_receive(connection, _HEADER.size))[0]
                loader.keep_at(_receive(connection, length).decode())
            else:
                loader.left(~index)
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def _answer(connection: socket.socket, loader: Loader, index: int) -> None:
    fds: list[int] = []
    try:
        fd, tensors = loader.load(index)
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
    places: Manifest = []
    end = 0
    for name, (shape, dtype) in parameters.items():
        start = _aligned(end)
        end = start + shape.numel() * dtype.itemsize
        places.append((name, start, list(shape), str(dtype).removeprefix("torch.")))
    header = json.dumps(places).encode()
    begin = _aligned(_LENGTH.size + len(header))
    fd = os.memfd_create("flexpiped-layer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, begin + end)
    pages = mmap.mmap(fd, begin + end)
    pages[: _LENGTH.size + len(header)] = _LENGTH.pack(len(header)) + header
    tensors = _moved(places, begin)
    views = {name: _view(pages, start, shape, parameters[name][1]) for name, start, shape, _ in tensors}
    return fd, tensors, views


def manifest_of(fd: int) -> Manifest:
    """Return what lies where in memory that ``lay_out`` has made, in whichever process."""
    (length,) = _LENGTH.unpack(os.pread(fd, _LENGTH.size, 0))
    return _moved(json.loads(os.pread(fd, length, _LENGTH.size)), _aligned(_LENGTH.size + length))


def _aligned(end: int) -> int:
    return -(-end // _ALIGNMENT) * _ALIGNMENT


def _moved(places: Manifest, begin: int) -> Manifest:
    return [(name, begin + start, shape, dtype) for name, start, shape, dtype in places]
