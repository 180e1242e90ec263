"""Run by an engine's interpreter before the engine: has the kernel kill this process with its parent, then becomes it.

``leash.py PARENT_PID COMMAND...``, standard library only. A function to call between fork and exec would be simpler,
but is not safe in a process that has threads, as the daemon does.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def leashed(python: str, command: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Return the command that runs ``command`` on a leash of the process that asks, by its interpreter ``python``."""
    return (python, "-I", "-S", __file__, str(os.getpid()), *command)


def main(arguments: list[str]) -> None:
    """Set the parent-death signal, which outlives exec, and become the command."""
    parent_pid, *command = arguments
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit("leash: prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent_pid):  # it ended before the call above
        sys.exit("leash: the parent has ended")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
