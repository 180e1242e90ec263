"""Small facts about processes that every engine needs: imports, dying with the parent, memory by the kernel's count."""

import ctypes
import os
import signal
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(*, parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however it ends. Call it first thing in the child.

    The signal follows the parent's *thread*, so a parent must start its children from its main thread.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it ended before the call above
        os._exit(1)


@cache
def import_root() -> Path:
    """Return a directory to put on the PYTHONPATH of an engine's interpreter: it holds our packages and nothing else.

    An engine may live in an environment of its own, with another torch; the daemon's site-packages must not reach it.
    """
    root = Path(__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):
        return root
    return _linked(Path(_link_directory().name))


def lasting_import_root(folder: Path) -> Path:
    """Return the same for an engine that outlives this process; where links are needed, they are in ``folder``."""
    root = Path(__file__).resolve().parents[1]
    return _linked(folder) if root.name in ("site-packages", "dist-packages") else root


def _linked(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for package in ("engines", "planner", "topology"):
        with suppress(FileExistsError):
            (folder / package).symlink_to(Path(__file__).resolve().parents[1] / package)
    return folder


@cache
def _link_directory() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="flexpiped-import-")  # removed when the interpreter exits


def memory_pss_bytes(pid: int) -> int | None:
    """Return the proportional set size of a process, or None when it is gone or not ours to read."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None


def state_of(pid: int) -> tuple[str, str] | None:
    """Return a process's state, a letter, and its start time, in kernel ticks; None where there is none (proc(5))."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    return None


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0))


def trim_heap() -> None:
    """Have the C library give freed heap pages back (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
