"""A process by its pid and start time, whoever its parent is: an engine that another daemon has started."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Self

from engines.process import state_of

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Return what tells this run of the kernel from every other: pids and start times count for one run only."""
    return _BOOT_ID.read_text().strip()


def start_of(pid: int) -> str:
    """Return when a process that runs was started, in kernel ticks; empty: there is none, or it has ended."""
    found = state_of(pid)
    return "" if found is None or found[0] in "ZX" else found[1]


def owner_of(pid: int) -> int | None:
    """Return the user id of a process, None where there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}").stat().st_uid
    return None


class FoundProcess:
    """Holds on to one process: once it is held, its pid may be given to another one without harm."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._ended: asyncio.Future[None] | None = None

    @classmethod
    def hold(cls, pid: int, *, start: str) -> Self | None:
        """Return the process with this pid that was started then; None: it is gone, and the pid may be another's."""
        try:
            pidfd = os.pidfd_open(pid)
        except (ProcessLookupError, OverflowError, ValueError):
            return None
        if start_of(pid) != start:  # asked only now, when the pid cannot get to another one unnoticed
            os.close(pidfd)
            return None
        return cls(pid, pidfd)

    async def ended(self) -> str:
        """Wait until it has ended, and say so. Its status is only for its parent."""
        loop = asyncio.get_running_loop()
        if self._ended is None:
            self._ended = loop.create_future()
            loop.add_reader(self._pidfd, self._note_end)
        await asyncio.shield(self._ended)
        return "ended"

    def kill(self) -> None:
        """Kill it, if it still runs."""
        self._signal(signal.SIGKILL)

    async def end(self, *, grace_s: float) -> None:
        """Ask it to end, kill it when it takes too long, and return when it has ended."""
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.ended(), grace_s)
        except TimeoutError:
            self.kill()
            await self.ended()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def let_go(self) -> None:
        """Forget it; it runs on. Idempotent."""
        if self._pidfd < 0:
            return
        if self._ended is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
