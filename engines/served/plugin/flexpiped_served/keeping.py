"""Layers that stay in the memory of the host when a rank has let go of them: the daemon keeps them.

What a helper has loaded it seals and offers to the daemon's keeper of parameters, and before it loads a layer it asks
there; so does a rank with its first layers. All instances on the host share what is kept. One JSON object is a packet;
descriptors travel beside it. Where the keeper does not answer, layers are loaded as without it.
"""

import fcntl
import hashlib
import json
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flexpiped_served.settings import PluginSettings
from flexpiped_served.weights import Manifest, manifest_of

_MOST_BYTES = 128 << 10
# The daemon answers within milliseconds, on an overloaded machine within seconds. Who is late is not asked again,
# so a load hangs on a daemon that never answers but once.
_DEADLINE_S = 10.0
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class KeptLayers:
    """A ``Loader`` that asks the keeper first. Each process has a connection of its own, made at first use.

    Args:
        settings: Where the keeper is, if there is one, and which model the layers are of.
        load: Loads a layer into shared memory of its own.
        key_of: Returns what tells a layer from all others of this host; empty: it cannot be told.
    """

    def __init__(
        self,
        settings: PluginSettings,
        load: Callable[[int], tuple[int, Manifest]],
        *,
        key_of: Callable[[int], str],
    ) -> None:
        self._address = settings.parameters
        self._of = settings.parameters_of
        self._load = load
        self._key_of = key_of
        self._socket: socket.socket | None = None
        self._used: dict[int, str] = {}  # keys of the layers that this process has from the keeper, or there
        self._asked: dict[int, str] = {}  # of those that it has looked for

    def load(self, index: int) -> tuple[int, Manifest]:
        kept = self.found(index)
        if kept is not None:
            return kept
        fd, manifest = self._load(index)
        self.offer(index, fd)
        return fd, manifest

    def found(self, index: int) -> tuple[int, Manifest] | None:
        """Return a layer's memory, which this process has from now on, and what lies where in it; None: not kept."""
        self.left(index)  # a rank has a layer once
        key = self._asked[index] = self._key_of(index) if self._address else ""
        kept = self._take(key) if key else None
        if kept is None:
            return None
        self._used[index] = key
        return kept, manifest_of(kept)

    def offer(self, index: int, fd: int) -> bool:
        """Have a layer kept that was not found; say whether it is. Its memory must not be mapped for writing."""
        key = self._asked.pop(index, "")  # of the files as they were before they were read
        if not key or not self._address or not sealed(fd) or not self._keep(key, index, fd):
            return False
        self._used[index] = key
        return True

    def left(self, index: int) -> None:
        key = self._used.pop(index, "")
        if key and self._socket is not None:
            with suppress(OSError):  # a keeper that is gone has no use for it
                self._socket.send(json.dumps({"type": "Left", "key": key}).encode(), socket.MSG_DONTWAIT)

    def keep_at(self, address: str) -> None:
        """Ask another keeper from now on; what was kept by the one before is the rank's own, and goes with it."""
        self.close()
        self._address = address
        self._used.clear()

    def forked(self) -> None:
        """In a fork: what was asked for before is the first process's, and so is the connection."""
        connection, self._socket = self._socket, None
        self._used.clear()
        if connection is not None:
            connection.close()  # this process's end alone

    def _take(self, key: str) -> int | None:
        answer, fds = self._ask({"type": "Take", "key": key})
        return fds[0] if answer.get("is_here") and fds else None

    def _keep(self, key: str, index: int, fd: int) -> bool:
        answer, _ = self._ask({"type": "Keep", "key": key, "name": str(index), "of": self._of}, fd)
        return bool(answer.get("is_kept"))

    def _ask(self, question: dict[str, str], *fds: int) -> tuple[dict[str, Any], list[int]]:
        try:
            connection = self._connected()
            socket.send_fds(connection, [json.dumps(question).encode()], fds)
            raw, found, _, _ = socket.recv_fds(connection, _MOST_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            return dict(json.loads(raw)), found
        except (OSError, ValueError):
            self.close()
            return {}, []

    def _connected(self) -> socket.socket:
        if self._socket is None:
            if not self._address:
                raise ConnectionRefusedError
            made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket = made  # closed with the rest, whatever comes of it
            made.settimeout(_DEADLINE_S)
            made.connect(f"\0{self._address}")
        return self._socket

    def close(self) -> None:
        """Ask no more, as when an answer is late: it must not be taken for that to another question. Idempotent."""
        connection, self._socket, self._address = self._socket, None, ""
        if connection is not None:
            connection.close()


def sealed(fd: int) -> bool:
    """Have nobody write to this memory any more; say whether that is so. Who has it mapped for writing prevents it."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        print(f"a layer cannot be kept in host memory: {error.strerror}", file=sys.stderr, flush=True)
        return False
    return True


def layer_key(*which: object, model: object, config: Any, files: Iterable[Path] | None) -> str:
    """Return what tells a layer of a model from all others of this host; empty: nothing does.

    Args:
        which: What its engine tells it by, beside the model.
        model: The engine's own, of whose class are the layers.
        config: The engine's ``ModelConfig``, of which both engines' have these fields.
        files: The checkpoint: one written anew has other layers. None: it is not in the safetensors format.

    Raises:
        OSError: A file is not there.
    """
    if files is None:
        return ""
    what = (type(model).__name__, config.hf_config.to_dict(), config.dtype, config.quantization, *which)
    at = [file.stat() for file in files]
    identity = [(each.st_dev, each.st_ino, each.st_mtime_ns, each.st_size) for each in at]
    return hashlib.sha256(json.dumps([what, identity], default=str).encode()).hexdigest()
