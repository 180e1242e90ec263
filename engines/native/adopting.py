"""How a native engine outlives its daemon, as daemons see it: what it leaves behind, and how the next one takes it."""

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from engines.found_process import FoundProcess, boot_id, start_of
from engines.frames import read_frame, write_frame
from engines.native import client_messages as c
from engines.native.launching import OwnPlace
from engines.native.reception import peer_of
from engines.records import EngineRecord, Purpose, write_record

_ANSWER_S = 10.0  # from an engine that has nothing else to do but to end what was under way


class NotAdopted(Exception):
    """The engine cannot be taken over; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """How one engine may outlive its daemon.

    Attributes:
        record: The file that tells the next daemon of it.
        adopt_within_s: So long it waits for one.
        leaving: Whether the daemon leaves its engines behind when it closes them.
    """

    purpose: Purpose
    name: str  # under which clients ask for the model
    place: OwnPlace
    record: Path
    adopt_within_s: float
    flexpiped: str
    leaving: Callable[[], bool]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedCore:
    """A core that serves already and has said what it is."""

    process: FoundProcess
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    report: c.Adopted
    life: Life


async def adopt(
    record: EngineRecord, process: FoundProcess, life: Life, *, deadline_s: float = _ANSWER_S
) -> AdoptedCore:
    """Connect to a core whose process is held, and have it say what it is.

    Raises:
        NotAdopted: It does not answer in time, another process answers, or it was started with other options.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(deadline_s):
            await asyncio.get_running_loop().sock_connect(connection, record.socket)
            if peer_of(connection)[0] != process.pid:
                raise NotAdopted(f"process {peer_of(connection)[0]} answers at {record.socket}, not {process.pid}")
            reader, writer = await asyncio.open_connection(sock=connection)
            write_frame(writer, c.encode(c.AdoptCore()))
            raw = await read_frame(reader)
    except TimeoutError:
        connection.close()
        raise NotAdopted(f"it has not answered within {deadline_s:g} s") from None
    except OSError as error:
        connection.close()
        raise NotAdopted(f"{record.socket}: {error.strerror or error}") from error
    except BaseException:
        connection.close()
        raise
    report = None if raw is None else c.decode_report(raw)
    if not isinstance(report, c.Adopted):
        writer.close()
        raise NotAdopted("it has ended" if report is None else f"it answers {type(report).__name__}")
    if c.options_digest(report.options) != record.purpose.options:
        writer.close()
        raise NotAdopted("it says that it was started with other options")
    return AdoptedCore(process=process, reader=reader, writer=writer, report=report, life=life)


def at(life: Life, *, record: Path, socket_path: Path) -> Life:
    """Return ``life`` as that of an engine that is there already."""
    log = socket_path.with_suffix(".log")
    return replace(life, record=record, place=replace(life.place, socket=socket_path, log=log))
