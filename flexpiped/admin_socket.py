"""The Unix socket between ``flexctl`` and the daemon: where it is, and how the daemon takes it. Standard library only.

AdminSocketError   the socket cannot be taken; the message says why
"""

import errno
import os
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

SYSTEM_SOCKET: Final = Path("/run/flexpiped/admin.sock")
SOCKET_MODE: Final = 0o660
_FOLDER_MODE: Final = 0o750
_LONGEST_PATH_BYTES: Final = 107  # sun_path less its terminator


class AdminSocketError(Exception):
    """The admin socket cannot be taken."""


def default_socket(environment: Mapping[str, str], *, uid: int) -> Path:
    """Return where the daemon of user ``uid`` listens.

    1. Under systemd: ``$RUNTIME_DIRECTORY``.
    2. In a session: ``$XDG_RUNTIME_DIR/flexpiped``.
    3. Else ``/run/user/UID/flexpiped`` where that can be (root makes it), or ``/tmp/flexpiped-UID``.
    """
    if runtime := environment.get("RUNTIME_DIRECTORY"):
        return Path(runtime.split(":")[0], "admin.sock")
    if session := environment.get("XDG_RUNTIME_DIR"):
        return Path(session, "flexpiped", "admin.sock")
    home = Path(f"/run/user/{uid}")
    if uid == 0 or home.is_dir():
        return home / "flexpiped" / "admin.sock"
    return Path(f"/tmp/flexpiped-{uid}", "admin.sock")


def candidate_sockets(environment: Mapping[str, str], *, uid: int) -> tuple[Path, ...]:
    """Return where ``flexctl`` looks for a daemon, in order: the user's own, then the system's."""
    own = default_socket(environment, uid=uid)
    return (own,) if own == SYSTEM_SOCKET else (own, SYSTEM_SOCKET)


def take_socket(path: Path, *, mode: int = SOCKET_MODE) -> socket.socket:
    """Return a listening socket at ``path``, for owner and group unless ``mode`` says otherwise.

    A socket that nobody answers is replaced.

    Raises:
        AdminSocketError: Another daemon answers there, or the place is not ours to use.
    """
    if len(os.fsencode(path)) > _LONGEST_PATH_BYTES:
        raise AdminSocketError(f"{path}: a socket's path has at most {_LONGEST_PATH_BYTES} bytes; set admin.socket")
    try:
        _make_folder(path.parent)
        _remove_stale(path)
        return _listen(path, mode)
    except OSError as error:
        raise AdminSocketError(f"{path}: {error.strerror or error}") from error


def inode_of(path: Path) -> int:
    """Return what tells this socket from another one that takes its place later."""
    return path.lstat().st_ino


def release_socket(path: Path, *, inode: int) -> None:
    """Remove the socket, unless another one is there by now."""
    with suppress(FileNotFoundError):
        if inode_of(path) == inode:
            path.unlink()


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)
    if folder.stat().st_uid not in (os.geteuid(), 0):
        raise AdminSocketError(f"{folder} belongs to another user")


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AdminSocketError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise AdminSocketError(f"another daemon answers at {path}; stop it, or set admin.socket")
    path.unlink()


def _listen(path: Path, mode: int) -> socket.socket:
    """Bind, restrict, then listen: nobody can connect before the mode is set."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
