"""The API server of an engine as a child of this process, or as a child of a keeper that may outlive this process."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol, Self

from engines.errors import EngineStartFailed
from engines.frames import read_frame, write_frame
from engines.launching import CoreProcess, OwnPlace, launch_apart
from engines.served import keeper_messages as k
from engines.served.group import process_ended
from engines.served.leash import leashed

KEEPER: Final = "engines.served.keeper"
_LINE_LIMIT: Final = 1 << 20
_POLL_S: Final = 0.02
_KEEPER_GRACE_S: Final = 10.0  # to take the engine's processes apart


class Hosted(Protocol):
    """The API server's process, whoever its parent is."""

    @property
    def pid(self) -> int:
        """Its process id, which is also the process group's."""

    @property
    def is_running(self) -> bool:
        """Whether it is not known to have ended."""

    def lines(self) -> AsyncIterator[bytes]:
        """Yield what any of the engine's processes writes, until no more can come."""

    async def how_ended(self) -> str:
        """Wait until it has ended; say how, as the end of a sentence."""

    def terminate(self) -> None:
        """Ask it to end."""

    async def gone(self) -> None:
        """Return when nothing is left of it: call it once it was killed."""

    async def leave(self) -> None:
        """Let it go on without this process, which forgets it."""


class Child:
    """One that ends with this process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, python: str, command: list[str], environment: dict[str, str], *, directory: Path) -> Self:
        """Start it. Call it from the main thread: a parent-death signal follows the thread.

        Raises:
            EngineStartFailed: The interpreter cannot be run.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                *leashed(python, command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=_LINE_LIMIT,
                env=environment,
                cwd=directory,  # python -m would import from the daemon's
                start_new_session=True,
            )
        except OSError as error:
            raise EngineStartFailed(f"cannot run {python}: {error.strerror}") from error
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    async def lines(self) -> AsyncIterator[bytes]:
        assert self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # longer than the limit: what was read of it is gone
                continue
            if not line:
                return
            yield line

    async def how_ended(self) -> str:
        # Not by wait(): that waits for the end of the log, too, which the other processes hold open.
        await process_ended(self.pid)
        while (status := self._process.returncode) is None:  # noqa: ASYNC110  the loop is about to reap it
            await asyncio.sleep(_POLL_S)
        return _words(status)

    def terminate(self) -> None:
        self._process.terminate()

    async def gone(self) -> None:
        await self._process.wait()

    async def leave(self) -> None:
        raise AssertionError("it ends with this process")


class InKeeping:
    """One that a keeper runs.

    Args:
        keeper: Its process.
        reader, writer: The connection to it.
        kept: What it has said of the engine.
    """

    def __init__(
        self, keeper: CoreProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: k.Kept
    ) -> None:
        self.keeper = keeper
        self.kept = kept
        self.writer = writer
        self._lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read(reader), name="engine-keeper")

    @classmethod
    async def start(
        cls, place: OwnPlace, python: str, command: list[str], environment: dict[str, str], *, directory: Path
    ) -> Self:
        """Start a keeper, and have it start the engine. Raises: EngineStartFailed."""
        keeper, connection = await launch_apart("", place, KEEPER)
        reader, writer = await asyncio.open_connection(sock=connection)
        asked = k.Keep(python=python, command=tuple(command), environment=environment, directory=str(directory))
        write_frame(writer, k.encode(asked))
        raw = await read_frame(reader)
        answer = k.NotStarted(reason="its keeper has ended") if raw is None else k.decode_report(raw)
        if not isinstance(answer, k.Kept):
            writer.close()
            await _end_of(keeper)
            raise EngineStartFailed(answer.reason if isinstance(answer, k.NotStarted) else f"it answers {answer}")
        return cls(keeper, reader, writer, answer)

    @property
    def pid(self) -> int:
        return self.kept.pid

    @property
    def is_running(self) -> bool:
        return not self._end.done()

    async def lines(self) -> AsyncIterator[bytes]:
        while (line := await self._lines.get()) is not None:
            yield line

    async def how_ended(self) -> str:
        return await asyncio.shield(self._end)

    def outlive(self, *, adopt_within_s: float, memo: k.Memo) -> None:
        """From here on it may stay when this process is gone."""
        write_frame(self.writer, k.encode(k.Outlive(adopt_within_s=adopt_within_s, memo=memo)))

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    async def gone(self) -> None:
        await _end_of(self.keeper)
        await self._let_go()

    async def leave(self) -> None:
        await self._let_go()

    async def _let_go(self) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()
        self.keeper.let_go()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        how = "has ended with its keeper"
        try:
            while (raw := await read_frame(reader)) is not None:
                match report := k.decode_report(raw):
                    case k.Lines(text=text):
                        self._lines.put_nowait(text)
                    case k.Ended(status=status):
                        how = _words(status)
                        break
                    case _:
                        raise AssertionError(f"{report} is no answer to anything")
        finally:
            self._lines.put_nowait(None)
            if not self._end.done():
                self._end.set_result(how)


async def _end_of(keeper: CoreProcess) -> None:
    """Wait for the end of a keeper that has nothing to keep any more; one that takes too long is killed."""
    try:
        await asyncio.wait_for(keeper.ended(), _KEEPER_GRACE_S)
    except TimeoutError:
        keeper.kill()
        await keeper.ended()


def _words(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
