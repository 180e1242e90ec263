"""The processes of one engine: started as one group, watched one by one, ended together.

The engine's API server is our child, or that of a keeper (``hosting``); those that schedule and compute are its
children, or theirs. All are in the process group of the API server.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from engines.launching import OwnPlace
from engines.served.freed import HostMemory, ProcessId, identify, still_runs, until_free
from engines.served.group import members_of, process_ended
from engines.served.hosting import Child, Hosted, InKeeping
from engines.served.keeper_messages import Memo
from engines.served.logs import LastWords, LogDialect, LogLine
from engines.served.run_directory import make_run_directory, note_shared_memory, remove_run_directory

_TERM_GRACE_S: Final = 5.0
_KILL_GRACE_S: Final = 5.0
_LINGER_S: Final = 0.5  # for the last lines of the log


class EngineServer:
    """One process group and its run directory.

    Args:
        name: The engine's, for people.
        dialect: How it writes.
        on_log: Told each line that any of the processes writes.
        on_death: Told once, in words, when a process ends that was not asked to.
        place: Where a keeper runs it that may outlive this process; None: it ends with this process.
        kept: One that a keeper runs already; else ``spawn`` starts it.
    """

    def __init__(
        self,
        *,
        name: str,
        dialect: LogDialect,
        on_log: Callable[[LogLine], None],
        on_death: Callable[[str], None],
        place: OwnPlace | None = None,
        kept: InKeeping | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        runs = None if place is None else place.runs
        self.run_directory = make_run_directory(runs) if kept is None else Path(kept.kept.directory)
        self._place = place
        self._name = name
        self._dialect = dialect
        self._clock = clock
        self._on_log = on_log
        self._on_death = on_death
        self._hosted: Hosted | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._log_task: asyncio.Task[None] | None = None
        self._last_words = LastWords()
        self._ending = False
        self.processes: set[ProcessId] = set()  # all that were seen; complete once it was killed or closed
        self._watched: list[tuple[ProcessId, str]] = []  # with their names, those first that take others with them
        self._closed: asyncio.Task[None] | None = None
        if kept is not None:
            self.host(kept)

    @property
    def pid(self) -> int:
        """The API server's process id, which is also the process group's."""
        assert self._hosted is not None
        return self._hosted.pid

    async def spawn(self, python: str, command: list[str], environment: dict[str, str]) -> None:
        """Start the API server. Call it from the main thread: a parent-death signal follows the thread.

        Raises:
            EngineStartFailed: The interpreter cannot be run.
        """
        if self._place is None:
            hosted: Hosted = await Child.start(python, command, environment, directory=self.run_directory)
        else:
            hosted = await InKeeping.start(self._place, python, command, environment, directory=self.run_directory)
        self.host(hosted)

    def host(self, hosted: Hosted) -> None:
        """Look after an API server that runs."""
        self._hosted = hosted
        self._log_task = asyncio.create_task(self._pump(hosted), name="engine-log")
        self._tasks = [self._log_task, asyncio.create_task(self._watch_api_server(hosted), name="engine-watch-api")]

    @property
    def keeper_pid(self) -> int:
        """The process id of its keeper."""
        assert isinstance(self._hosted, InKeeping)
        return self._hosted.keeper.pid

    def outlive(self, *, adopt_within_s: float, memo: Memo) -> None:
        """From here on it stays for so long when this process is gone, with ``memo`` for the next one."""
        assert isinstance(self._hosted, InKeeping)
        self._hosted.outlive(adopt_within_s=adopt_within_s, memo=memo)

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
        if self._hosted is None:
            return
        members = members_of(self.pid)
        self.processes |= identify(members)
        if self._hosted.is_running or members:
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

    async def leave(self) -> None:
        """Let the engine go on for the next daemon. Idempotent, and ``close`` does nothing after it."""
        if self._closed is None:
            self._closed = asyncio.create_task(self._leave(), name="engine-leave")
        await asyncio.shield(self._closed)

    async def _leave(self) -> None:
        self._ending = True
        assert self._hosted is not None
        await self._hosted.leave()
        await self._stop_watching()

    async def _close(self) -> None:
        polite, self._ending = not self._ending, True
        if self._hosted is not None:
            assert self._log_task is not None
            if self.run_directory.exists():
                self.note_shared_memory()
            if polite and self._hosted.is_running:
                self._hosted.terminate()
                with suppress(TimeoutError):
                    await asyncio.wait_for(process_ended(self.pid), _TERM_GRACE_S)
            self.kill()
            await self._hosted.gone()
            await until_free(self.processes, HostMemory(), deadline_s=_KILL_GRACE_S)
            await asyncio.wait([self._log_task], timeout=_LINGER_S)
            await self._stop_watching()
        remove_run_directory(self.run_directory)

    async def _stop_watching(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(self, hosted: Hosted) -> None:
        async for raw in hosted.lines():
            line = self._dialect.parse(raw.decode(errors="replace"))
            if line.message.strip():
                self._last_words.note(line, now_s=self._clock())
                self._on_log(line)

    async def _watch(self, pid: int) -> None:
        await process_ended(pid)
        process, name = next(entry for entry in self._watched if not still_runs(entry[0]))
        self._die(f"{name} (pid {process.pid}) has ended")

    async def _watch_api_server(self, hosted: Hosted) -> None:
        how = await hosted.how_ended()
        if not self._ending and self._log_task is not None:
            await asyncio.wait([self._log_task], timeout=_LINGER_S)
        self._die(f"{self._name}'s API server {how}")

    def _die(self, reason: str) -> None:
        if not self._ending:
            self._ending = True
            self._on_death(reason)
