"""A stage worker as a process: what it sees to before it serves, and what it says when it fails."""

import os
import signal
import sys
from typing import Final

import torch

from engines.failpoints import FailpointHit
from engines.native import messages as m
from engines.native.context import WorkerContext
from engines.native.worker import Worker
from engines.process import die_with_parent

_THREAD_SWITCH_S: Final = 0.0005  # so that the loading thread's bits of Python never hold a step up for long


def worker_main(index: int, context: WorkerContext, *, core_pid: int) -> int:
    """Run a worker in a process that has just been forked; return its exit status."""
    die_with_parent(parent_pid=core_pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    os.nice(context.nice)
    sys.setswitchinterval(_THREAD_SWITCH_S)
    torch.set_num_threads(1)
    try:
        Worker(index, context).run()
    except (FailpointHit, OSError, KeyError, ValueError, RuntimeError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}"
        context.core_inbox.send(m.encode(m.Crashed(worker=index, reason=reason)))
        return 1
    return 0
