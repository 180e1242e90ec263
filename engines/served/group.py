"""The processes of one engine, which are a process group: who is in it, and when one of them has ended."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path


async def process_ended(pid: int) -> None:
    """Return when a process has ended, whoever its parent is."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def members_of(group: int) -> list[int]:
    """Return the processes of a process group that still run."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                state, _parent, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(its_group) == group and state not in "ZX":
                    found.append(int(entry.name))
    return found


def kill_group(group: int) -> None:
    """Kill what still runs of a process group."""
    if members_of(group):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
