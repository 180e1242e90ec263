"""What an engine that outlives its daemon leaves behind for the next one, and what speaks against adopting it (pure).

record --process gone or not provably ours--> forgotten
       --ours, but not what is asked for, or it does not answer--> ended
       --ours, as asked for, and it answers--> adopted
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engines.found_process import boot_id, owner_of, start_of

_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Purpose:
    """What an engine is for. Only one with an equal purpose is adopted.

    Attributes:
        model: The directory of the model.
        files: Digest of the model's files.
        options: Digest of everything that the engine is told at its start.
        protocol: Digest of what daemon and engine say to each other.
        basis: What the configuration says of the keys that a layout rests on, in words.
    """

    engine: str
    model: str
    files: str
    options: str
    protocol: str
    basis: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """One engine. ``start`` is when its process was started, in kernel ticks: with ``boot`` it proves the pid."""

    purpose: Purpose
    name: str  # under which clients ask for the model
    pid: int
    start: str
    boot: str
    socket: str
    flexpiped: str  # the version that started it
    since_unix_s: float
    version: int = _VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFacts:
    """What the kernel says of the process that has a pid now. ``start`` empty: there is none."""

    start: str
    owner: int | None
    boot: str


class InvalidRecord(Exception):
    """A file that is no record, or not ours; the message says which and why."""


def facts_of(pid: int) -> ProcessFacts:
    """Ask the kernel."""
    return ProcessFacts(start=start_of(pid), owner=owner_of(pid), boot=boot_id())


def against_ownership(record: EngineRecord, facts: ProcessFacts, *, uid: int) -> str:
    """Say why the process is not provably the engine of this record; empty: it is.

    1. The host was booted meanwhile. 2. It has ended. 3. Another process has its pid. 4. It is another user's.
    """
    if record.boot != facts.boot:  # 1
        return "the host was booted since"
    if not facts.start:  # 2
        return f"process {record.pid} has ended"
    if record.start != facts.start:  # 3
        return f"process {record.pid} is another one by now"
    if facts.owner != uid:  # 4
        return f"process {record.pid} belongs to another user"
    return ""


def against_purpose(record: EngineRecord, wanted: Purpose) -> str:
    """Say why an engine is not what is asked for now; empty: it is."""
    was = record.purpose
    for name in ("engine", "model"):
        before, now = getattr(was, name), getattr(wanted, name)
        if before != now:
            return f"{name} was {before} and is {now} now"
    for key, now in wanted.basis.items():
        if (before := was.basis.get(key, "")) != now:
            return f"{key} was {before} and is {now} in the configuration now"
    if was.files != wanted.files:
        return "the model's files have changed"
    if was.options != wanted.options:
        return "it was started with other options"
    if was.protocol != wanted.protocol:
        return f"flexpiped {record.flexpiped}, which started it, spoke with it in another way"
    return ""


def write_record(file: Path, record: EngineRecord) -> None:
    """Write a record, for its owner only.

    Raises:
        OSError
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=file.parent, prefix=".", delete=False) as part:  # its mode is 0600
        part.write(msgspec.json.format(msgspec.json.encode(record)))
        part.flush()
        os.fsync(part.fileno())
    Path(part.name).replace(file)


def read_record(file: Path) -> EngineRecord:
    """Return the record that a file holds.

    Raises:
        InvalidRecord: It is none, it is another user's, or others may write to it.
        OSError
    """
    with file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise InvalidRecord(f"{file}: others could have written it")
        text = opened.read()
    try:
        record = msgspec.json.decode(text, type=EngineRecord)
    except msgspec.MsgspecError as error:
        raise InvalidRecord(f"{file}: {error}") from error
    if record.version != _VERSION:
        raise InvalidRecord(f"{file}: version {record.version}; this flexpiped reads version {_VERSION}")
    return record
