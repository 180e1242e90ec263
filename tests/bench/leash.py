"""``python -m tests.bench.leash FOLDER COMMAND...``: runs a command in FOLDER until standard input ends.

The command leads a process group of its own. When whoever holds the other end of standard input lets go, or dies in
whatever way, or when this program is asked to end, the group is asked to end and then made to. When this program is
killed, the kernel kills the command. So no server outlives a benchmark.
"""

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

from engines.process import die_with_parent

_GRACE_S = 10.0
_POLL_S = 0.5
_asked: list[int] = []  # signals that ask for the end


def main() -> int:
    """Run the command and return its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's interrupt is for the benchmark, which then lets go
    for number in (signal.SIGTERM, signal.SIGHUP):  # a second one must not break off what ends the group
        signal.signal(number, lambda number, _frame: _asked.append(number))
    leash = os.getpid()
    child = subprocess.Popen(
        sys.argv[2:],
        cwd=sys.argv[1],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(parent_pid=leash),
    )
    try:
        while child.poll() is None and not _asked and not _let_go():
            pass
    finally:
        _end_group(child)
    return child.returncode


def _let_go() -> bool:
    readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
    return bool(readable) and os.read(sys.stdin.fileno(), 1) == b""


def _end_group(child: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


if __name__ == "__main__":
    sys.exit(main())
