"""The processes of one engine: started as one group, watched one by one, ended together.

The engine's API server is our child; those that schedule and compute are its children, or theirs. All are in the
process group of the API server.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from engines.errors import EngineStartFailed
from engines.served.freed import HostMemory, ProcessId, identify, still_runs, until_free
from engines.served.logs import LastWords, LogDialect, LogLine
from engines.served.run_directory import make_run_directory, note_shared_memory, remove_run_directory

_LEASH: Final = Path(__file__).with_name("leash.py")
_TERM_GRACE_S: Final = 5.0
_KILL_GRACE_S: Final = 5.0
_LINGER_S: Final = 0.5  # for the last lines of the log
_POLL_S: Final = 0.02
_LINE_LIMIT: Final = 1 << 20


class EngineServer:
    """One process group and its run directory.

    Args:
        name: The engine's, for people.
        dialect: How it writes.
        on_log: Told each line that any of the processes writes.
        on_death: Told once, in words, when a process ends that was not asked to.
    """

    def __init__(
        self,
        *,
        name: str,
        dialect: LogDialect,
        on_log: Callable[[LogLine], None],
        on_death: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run_directory = make_run_directory()
        self._name = name
        self._dialect = dialect
        self._clock = clock
        self._on_log = on_log
        self._on_death = on_death
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._log_task: asyncio.Task[None] | None = None
        self._last_words = LastWords()
        self._ending = False
        self.processes: set[ProcessId] = set()  # all that were seen; complete once it was killed or closed
        self._watched: list[tuple[ProcessId, str]] = []  # with their names, those first that take others with them
        self._closed: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """The API server's process id, which is also the process group's."""
        assert self._process is not None
        return self._process.pid

    async def spawn(self, python: str, command: list[str], environment: dict[str, str]) -> None:
        """Start the API server. Call it from the main thread: a parent-death signal follows the thread.

        Raises:
            EngineStartFailed: The interpreter cannot be run.
        """
        leash = (python, "-I", "-S", str(_LEASH), str(os.getpid()))
        try:
            self._process = await asyncio.create_subprocess_exec(
                *leash,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=_LINE_LIMIT,
                env=environment,
                cwd=self.run_directory,  # python -m would import from the daemon's
                start_new_session=True,
            )
        except OSError as error:
            raise EngineStartFailed(f"cannot run {python}: {error.strerror}") from error
        assert self._process.stdout is not None
        self._log_task = asyncio.create_task(self._pump(self._process.stdout), name="engine-log")
        watch = asyncio.create_task(self._watch_api_server(self._process), name="engine-watch-api")
        self._tasks = [self._log_task, watch]

    def watch(self, processes: Iterable[tuple[int, str]]) -> None:
        """The engine is ready: report the death of any of these processes at once, however it ends.

        Each has its name in words. When several end together, the first in this order is taken for the cause.
        """
        self._last_words.ready()
        for pid, name in processes:
            found = identify([pid])
            self.processes |= found
            self._watched += [(process, name) for process in found or {ProcessId(pid, "")}]
            self._tasks.append(asyncio.create_task(self._watch(pid), name=f"engine-watch-{pid}"))
        self.note_shared_memory()

    def note_shared_memory(self) -> None:
        """Remember the shared memory that the group has mapped now."""
        note_shared_memory(self.run_directory, members_of(self.pid))

    def kill(self) -> None:
        """Kill the whole group now. What is left to do, ``close`` does."""
        self._ending = True
        if self._process is None:
            return
        members = members_of(self.pid)
        self.processes |= identify(members)
        if self._process.returncode is None or members:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def with_last_words(self, reason: str) -> str:
        """Return ``reason`` with what the engine last said of trouble, if it did."""
        words = self._last_words.said(now_s=self._clock())
        return f"{reason}: {words}" if words else reason

    async def close(self) -> None:
        """End all processes, politely first, and remove what they leave behind. Idempotent."""
        if self._closed is None:
            self._closed = asyncio.create_task(self._close(), name="engine-close")
        await asyncio.shield(self._closed)

    async def _close(self) -> None:
        polite, self._ending = not self._ending, True
        if self._process is not None:
            assert self._log_task is not None
            self.note_shared_memory()
            if polite and self._process.returncode is None:
                self._process.terminate()
                with suppress(TimeoutError):
                    await asyncio.wait_for(process_ended(self.pid), _TERM_GRACE_S)
            self.kill()
            await self._process.wait()
            await until_free(self.processes, HostMemory(), deadline_s=_KILL_GRACE_S)
            await asyncio.wait([self._log_task], timeout=_LINGER_S)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        remove_run_directory(self.run_directory)

    async def _pump(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                raw = await stream.readline()
            except ValueError:  # longer than the limit: what was read of it is gone
                continue
            if not raw:
                return
            line = self._dialect.parse(raw.decode(errors="replace"))
            if line.message.strip():
                self._last_words.note(line, now_s=self._clock())
                self._on_log(line)

    async def _watch(self, pid: int) -> None:
        await process_ended(pid)
        process, name = next(entry for entry in self._watched if not still_runs(entry[0]))
        self._die(f"{name} (pid {process.pid}) has ended")

    async def _watch_api_server(self, process: asyncio.subprocess.Process) -> None:
        # Not by wait(): that waits for the end of the log, too, which the other processes hold open.
        await process_ended(process.pid)
        while (status := process.returncode) is None:  # noqa: ASYNC110  the loop is about to reap it
            await asyncio.sleep(_POLL_S)
        if not self._ending and self._log_task is not None:
            await asyncio.wait([self._log_task], timeout=_LINGER_S)
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        self._die(f"{self._name}'s API server {how}")

    def _die(self, reason: str) -> None:
        if not self._ending:
            self._ending = True
            self._on_death(reason)


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
