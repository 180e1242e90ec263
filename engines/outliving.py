"""How an engine outlives its daemon, as daemons see it: what it leaves behind, and how the next one reaches it."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from engines.found_process import FoundProcess, boot_id, start_of
from engines.launching import OwnPlace
from engines.reception import peer_of
from engines.records import EngineRecord, Purpose, write_record


class NotAdopted(Exception):
    """The engine cannot be taken over; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliving:
    """How one engine may outlive its daemon.

    Attributes:
        record: The file that tells the next daemon of it.
        adopt_within_s: So long it waits for one.
        leaving: Whether the daemon leaves its engines behind when it closes them.
        parameters: Address of this daemon's keeper of parameters, to which an engine that is adopted turns; empty: it
            has none.
    """

    purpose: Purpose
    name: str  # under which clients ask for the model
    place: OwnPlace
    record: Path
    adopt_within_s: float
    flexpiped: str
    leaving: Callable[[], bool]
    parameters: str = ""

    @property
    def is_leaving(self) -> bool:
        return self.leaving()

    def note(self, pid: int) -> None:
        """Leave the record. Raises ``OSError``."""
        write_record(
            self.record,
            EngineRecord(
                purpose=self.purpose,
                name=self.name,
                pid=pid,
                start=start_of(pid),
                boot=boot_id(),
                socket=str(self.place.socket),
                flexpiped=self.flexpiped,
                since_unix_s=time.time(),
            ),
        )

    def last_words(self) -> str:
        """Return the last line that its processes have written, where they have a log of their own."""
        try:
            lines = self.place.log.read_text(errors="replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def forget(self) -> None:
        """Remove what the engine has left, once it has ended."""
        for file in (self.record, self.place.socket, self.place.log):
            with suppress(OSError):
                file.unlink()


def at(outliving: Outliving, *, record: Path, socket_path: Path) -> Outliving:
    """Return ``outliving`` as that of an engine that is there already."""
    log = socket_path.with_suffix(".log")
    return replace(outliving, record=record, place=replace(outliving.place, socket=socket_path, log=log))


async def reach(record: EngineRecord, process: FoundProcess) -> socket.socket:
    """Connect to an engine whose process is held.

    Raises:
        NotAdopted: Another process listens there.
        OSError: Nobody does.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(connection, record.socket)
        if peer_of(connection)[0] != process.pid:
            raise NotAdopted(f"process {peer_of(connection)[0]} answers at {record.socket}, not {process.pid}")
    except BaseException:
        connection.close()
        raise
    return connection


@asynccontextmanager
async def connected(
    record: EngineRecord, process: FoundProcess, *, deadline_s: float
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to an engine whose process is held, for what both say first: it is closed only where that fails.

    Raises:
        NotAdopted: It does not answer in time, or another process answers.
    """
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await asyncio.open_connection(sock=await reach(record, process))
            try:
                yield reader, writer
            except BaseException:
                writer.close()
                raise
    except TimeoutError:
        raise NotAdopted(f"it has not answered within {deadline_s:g} s") from None
    except OSError as error:
        raise NotAdopted(f"{record.socket}: {error.strerror or error}") from error
