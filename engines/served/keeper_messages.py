"""Messages between a daemon and the keeper of an engine that may outlive it, as frames on a Unix socket."""

import hashlib
import json
from collections.abc import Mapping
from typing import Final

import msgspec


class Memo(msgspec.Struct, frozen=True, kw_only=True):
    """What the next daemon has to know of an engine, and the engine does not say by itself. It is in no file.

    Attributes:
        device_ids: Of the ranks, in rank order.
        counts: Decoders on each pipeline rank, at its start.
        epoch: That of the layout it started with.
        secrets: Keys of its server.
    """

    version: str  # of the engine
    device_ids: tuple[str, ...]
    tensor_parallel: int
    counts: tuple[int, ...]
    epoch: int
    secrets: Mapping[str, str] = {}


class ToKeeper(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of what a keeper may receive."""


class Keep(ToKeeper, frozen=True, kw_only=True, tag=True):
    """The first frame: start this engine. Answered by ``Kept`` or ``NotStarted``."""

    python: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    directory: str  # its run directory, which from here on is the keeper's to remove


class Outlive(ToKeeper, frozen=True, kw_only=True, tag=True):
    """The engine serves, and from here on it stays for so long when the daemon is gone."""

    adopt_within_s: float
    memo: Memo


class FromKeeper(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of what a daemon may receive."""


class Kept(FromKeeper, frozen=True, kw_only=True, tag=True):
    """What runs; also the first word to each later daemon. ``pid`` is that of the API server, and the group's."""

    pid: int
    directory: str
    memo: Memo | None


class NotStarted(FromKeeper, frozen=True, kw_only=True, tag=True):
    """It could not be started at all."""

    reason: str


class Lines(FromKeeper, frozen=True, kw_only=True, tag=True):
    """What any of the engine's processes has written: one line."""

    text: bytes


class Ended(FromKeeper, frozen=True, kw_only=True, tag=True):
    """The API server has ended, with this status as ``Popen.returncode`` has it; all others are ended now."""

    status: int


KeeperCommand = Keep | Outlive
KeeperReport = Kept | NotStarted | Lines | Ended
encode: Final = msgspec.msgpack.Encoder().encode
decode_command: Final = msgspec.msgpack.Decoder(KeeperCommand).decode
decode_report: Final = msgspec.msgpack.Decoder(KeeperReport).decode


def protocol_digest() -> str:
    """Return what tells these messages from those of another version."""
    schemas = [msgspec.json.schema(each, ref_template="{name}") for each in (KeeperCommand, KeeperReport)]
    return hashlib.sha256(json.dumps(schemas, sort_keys=True).encode()).hexdigest()
