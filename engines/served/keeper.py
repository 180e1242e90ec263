"""The parent of an engine that may outlive its daemon: starts it, passes on what it writes, waits for the next daemon.

    daemon --Keep--> STARTED --Outlive--> KEPT --daemon gone--> ALONE --next daemon--> KEPT
                        | daemon gone       | engine ended        | nobody in time, or its socket is gone; engine ended
                        +-------------------+---------------------+--> all processes end, and then this one

The engine dies with this process as it would with a daemon (parent-death signal), so nothing in the engine knows of
it. SIGTERM ends both. It reads what the engine writes as long as it lives: an engine whose pipe is full would stop.
"""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from contextlib import suppress
from pathlib import Path
from typing import assert_never

from engines.frames import read_frame, write_frame
from engines.process import die_with_parent
from engines.reception import Reception
from engines.served import keeper_messages as k
from engines.served.group import kill_group, members_of, process_ended
from engines.served.leash import leashed
from engines.served.run_directory import note_shared_memory, own_run_directory, remove_run_directory

_LINE_LIMIT = 1 << 20
_MOST_UNSENT_BYTES = 8 << 20  # of a daemon that does not read: it loses lines, and the engine goes on
_TERM_GRACE_S = 3.0  # less than a daemon waits before it kills this process
_KILL_GRACE_S = 5.0
_LINGER_S = 0.5  # for the last lines
_POLL_S = 0.02


class Keeper:
    """One engine's. Used on one event loop, in the main thread: the parent-death signal follows the thread."""

    def __init__(self, reception: Reception) -> None:
        self._reception = reception
        self._process: Process | None = None
        self._directory = Path()
        self._memo: k.Memo | None = None
        self._adopt_within_s: float | None = None  # None: the engine ends with its daemon
        self._writer: asyncio.StreamWriter | None = None  # to the daemon that is there
        self._over = asyncio.Event()  # there is nothing to keep any more
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self, connection: socket.socket) -> None:
        """Return when the engine has ended, for whatever reason, and nothing of it is left."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._over.set)
        daemon: socket.socket | None = connection
        try:
            while daemon is not None:
                await self._serve(daemon)
                daemon = await self._next_daemon()
        finally:
            await self._end()
            self._reception.close()

    # --- one daemon after the other ---

    async def _serve(self, connection: socket.socket) -> None:
        """Return when this daemon is gone, or all is over."""
        reader, self._writer = await asyncio.open_connection(sock=connection)
        if self._process is not None:
            self._send(self._kept(self._process))
        obeying = asyncio.create_task(self._obey(reader))
        await self._first_of(obeying)
        if self._over.is_set():
            await self._tell_end()
        writer, self._writer = self._writer, None
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async def _next_daemon(self) -> socket.socket | None:
        if self._over.is_set() or self._adopt_within_s is None:
            return None
        coming = asyncio.create_task(self._reception.next_daemon(within_s=self._adopt_within_s))
        await self._first_of(coming)
        return coming.result() if coming.done() and not coming.cancelled() else None

    async def _first_of(self, work: asyncio.Task[object]) -> None:
        """Wait for ``work``, but no longer than there is something to keep; then it is cancelled."""
        over = asyncio.create_task(self._over.wait())
        await asyncio.wait([work, over], return_when=asyncio.FIRST_COMPLETED)
        for task in (work, over):
            task.cancel()
        await asyncio.wait([work, over])

    async def _obey(self, reader: asyncio.StreamReader) -> None:
        while (raw := await read_frame(reader)) is not None:
            match command := k.decode_command(raw):
                case k.Keep():
                    await self._start(command)
                case k.Outlive():
                    self._adopt_within_s, self._memo = command.adopt_within_s, command.memo
                case _:
                    assert_never(command)

    def _send(self, report: k.KeeperReport) -> None:
        if self._writer is not None:
            write_frame(self._writer, k.encode(report))

    # --- the engine ---

    async def _start(self, asked: k.Keep) -> None:
        self._directory = Path(asked.directory)
        own_run_directory(self._directory)
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *leashed(asked.python, asked.command),
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                limit=_LINE_LIMIT,
                env=dict(asked.environment),
                cwd=self._directory,
                start_new_session=True,
            )
        except OSError as error:
            self._send(k.NotStarted(reason=f"cannot run {asked.python}: {error.strerror}"))
            self._over.set()
            return
        self._send(self._kept(process))
        assert process.stdout is not None
        reading = asyncio.create_task(self._pass_on(process.stdout), name="keeper-lines")
        watching = asyncio.create_task(self._watch(process, reading), name="keeper-watch")
        self._tasks = [reading, watching]

    def _kept(self, process: Process) -> k.Kept:
        return k.Kept(pid=process.pid, directory=str(self._directory), memo=self._memo)

    async def _pass_on(self, stream: asyncio.StreamReader) -> None:
        """Give each line to the daemon, or to the log while there is none."""
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than the limit: what was read of it is gone
                continue
            if not line:
                return
            if self._writer is None:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            elif self._writer.transport.get_write_buffer_size() < _MOST_UNSENT_BYTES:
                self._send(k.Lines(text=line))

    async def _watch(self, process: Process, reading: asyncio.Task[None]) -> None:
        # Not by wait(): that waits for the end of the lines, too, which the other processes hold open.
        await process_ended(process.pid)
        await asyncio.wait([reading], timeout=_LINGER_S)
        self._over.set()

    async def _tell_end(self) -> None:
        """End what is left, then say so: who hears it may take the engine's place at once."""
        await self._end()
        if self._process is not None and self._process.returncode is not None:
            self._send(k.Ended(status=self._process.returncode))

    async def _end(self) -> None:
        """End all processes, politely first, and remove what they leave behind. Idempotent."""
        process = self._process
        if process is None or not self._directory.exists():
            return
        note_shared_memory(self._directory, members_of(process.pid))
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(process_ended(process.pid), _TERM_GRACE_S)
        kill_group(process.pid)
        with suppress(TimeoutError):
            async with asyncio.timeout(_KILL_GRACE_S):
                while process.returncode is None or members_of(process.pid):  # noqa: ASYNC110  nobody tells
                    await asyncio.sleep(_POLL_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        remove_run_directory(self._directory)


def main() -> None:
    """``keeper.py CONNECTION PARENT LISTENER``: descriptors, as ``engines.launching`` passes them; no parent counts."""
    connection, parent, listener = (int(number) for number in sys.argv[1:4])
    if parent:
        die_with_parent(parent_pid=parent)
    if os.getsid(0) != os.getpid():
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reception = Reception(socket.socket(fileno=listener))
    asyncio.run(Keeper(reception).run(socket.socket(fileno=connection)))


if __name__ == "__main__":
    main()
