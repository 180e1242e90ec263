"""The private directory of one engine: its sockets and temporary files, and a list of what must go with it.

A daemon that was killed cleans nothing up: the engine's processes die with it, their files stay. So each directory
names its owner, the daemon or a keeper that may outlive it, and who makes a new one first removes those whose owner is
gone, with the shared memory listed.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from engines.process import state_of

HTTP_SOCKET: Final = "http.sock"  # of the engine's own server
_PREFIX: Final = "flexpiped-engine-"
_OWNER: Final = "owner"  # pid and start time of the process that looks after the engine
_SHARED: Final = "shared-memory"  # one name in /dev/shm a line
_SHM: Final = Path("/dev/shm")
_MAPPED: Final = re.compile(r" /dev/shm/(\S+)$", re.MULTILINE)


def make_run_directory(parent: Path | None = None) -> Path:
    """Make a directory for one engine, for its user only. The path is short enough for Unix sockets in it.

    Args:
        parent: Where; None: where temporary files are.
    """
    parent = parent or Path(tempfile.gettempdir())
    parent.mkdir(mode=0o700, exist_ok=True)
    sweep(parent)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    own_run_directory(directory)
    return directory


def own_run_directory(directory: Path) -> None:
    """Note that the directory is this process's: it stays as long as that runs."""
    _write_whole(directory / _OWNER, f"{os.getpid()} {_started(os.getpid())}")


def remove_run_directory(directory: Path) -> None:
    """Remove the directory and the shared memory that it lists."""
    with suppress(FileNotFoundError):
        for name in (directory / _SHARED).read_text().splitlines():
            listed = _SHM / Path(name).name
            if listed.is_dir():
                shutil.rmtree(listed, ignore_errors=True)
            else:
                listed.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def note_shared_memory(directory: Path, pids: Iterable[int]) -> None:
    """List what these processes have mapped in /dev/shm, so that it goes with the directory."""
    list_shared_memory(directory, set().union(*(shared_memory_of(pid) for pid in pids)))


def list_shared_memory(directory: Path, names: set[str]) -> None:
    """List these names in /dev/shm, each of a file or a directory, so that they go with the run directory."""
    listed = directory / _SHARED
    known = set(listed.read_text().splitlines()) if listed.exists() else set()
    found = known | names
    if found != known:
        _write_whole(listed, "".join(f"{name}\n" for name in sorted(found)))


def shared_memory_of(pid: int) -> set[str]:
    """Return the names in /dev/shm that a process has mapped."""
    try:
        return set(_MAPPED.findall(Path(f"/proc/{pid}/maps").read_text()))
    except (OSError, UnicodeDecodeError):  # it has ended, or is another user's
        return set()


def sweep(parent: Path) -> None:
    """Remove the run directories in ``parent`` whose owner is gone."""
    for directory in parent.glob(f"{_PREFIX}*"):
        try:
            number, _, started = (directory / _OWNER).read_text().partition(" ")
            pid, mine = int(number), directory.stat().st_uid == os.getuid()
        except (OSError, ValueError):  # not finished, on a full disk for ever, or not ours to read
            continue
        if mine and _started(pid) != started:
            remove_run_directory(directory)


def _write_whole(path: Path, content: str) -> None:
    """Write a file that another daemon never reads in part."""
    fresh = path.with_suffix(".new")
    fresh.write_text(content)
    fresh.replace(path)


def _started(pid: int) -> str:
    """Return when a process started, in the kernel's ticks; empty when there is none."""
    state = state_of(pid)
    return "" if state is None else state[1]
