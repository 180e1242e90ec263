"""``python -m tests.bench.leash FOLDER COMMAND...``: runs a command in FOLDER until standard input ends.

The command leads a process group of its own. When whoever holds the other end of standard input lets go, or dies in
whatever way, the group is asked to end and then made to, so that no server outlives a benchmark.
"""

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

_GRACE_S = 10.0
_POLL_S = 0.5


def main() -> int:
    """Run the command and return its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's interrupt is for the benchmark, which then lets go
    child = subprocess.Popen(sys.argv[2:], cwd=sys.argv[1], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while child.poll() is None and not _let_go():
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
