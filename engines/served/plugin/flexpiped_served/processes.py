"""Small facts about this process."""

import ctypes
import os
import signal
import threading
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(*, parent_pid: int, by: int = signal.SIGKILL) -> None:
    """Have the kernel send ``by`` to this process when its parent ends. Covers this process only, so each calls it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, by, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(1)


def trim_heap() -> None:
    """Have the C library give freed heap pages back (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def lower_this_thread(nice: int) -> None:
    """Raise the niceness of the calling thread alone (Linux)."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def first_to_be_killed() -> None:
    """Have the kernel end this process before others when memory runs out."""
    Path("/proc/self/oom_score_adj").write_text("1000")
