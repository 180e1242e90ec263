"""API keys: a file of hashes, each with a name, scopes and limits. Keys are long and random, so one SHA-256 is enough.

::

    [[keys]]
    name = "alice"
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    scopes = ["infer"]
    max_requests_in_flight = 8       # the rest is optional
    requests_per_minute = 60.0
    priority = 0                     # of two that wait, the higher one goes first

KeyFileError   the file cannot be used; the message says where and why
"""

import hashlib
import hmac
import tomllib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Final

import msgspec


class KeyFileError(Exception):
    """The file of API keys cannot be used."""


class Scope(Enum):
    """What a key opens on the HTTP port; the admin API is a Unix socket of its own, opened by file permission."""

    INFER = "infer"  # everything that generates, and the list of models
    READ = "read"  # metrics, what the dashboard shows, and the list of models
    ADMIN = "admin"  # both, and changing the layout from the dashboard


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Whose request it is. Limits are None where there is none."""

    name: str = ""
    scopes: frozenset[Scope] = frozenset(Scope)
    max_requests_in_flight: int | None = None
    requests_per_minute: float | None = None
    priority: int = 0

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes


ANYBODY: Final = Client()
NAME_PATTERN: Final = r"^[A-Za-z0-9_.@-]{1,64}$"


class _Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    scopes: Annotated[list[Scope], msgspec.Meta(min_length=1)]
    max_requests_in_flight: Annotated[int, msgspec.Meta(ge=1)] | None = None
    requests_per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-100, le=100)] = 0


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[_Key]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRing:
    """The keys that open the HTTP port. ``hashes`` and ``clients`` belong together, one to one."""

    hashes: tuple[bytes, ...] = ()
    clients: tuple[Client, ...] = ()

    def client_of(self, presented: str) -> Client | None:
        """Return whose key it is. It takes the same time wherever in the file the key is, and if it is none."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found: Client | None = None
        for known, client in zip(self.hashes, self.clients, strict=True):
            if hmac.compare_digest(known, digest):
                found = client
        return found


def load_keys(file: Path) -> KeyRing:
    """Return the keys that a file holds.

    Raises:
        KeyFileError: It cannot be read, has a mistake, or two keys have one name or are the same.
    """
    try:
        wire = msgspec.convert(tomllib.loads(file.read_text(encoding="utf-8")), _File)
    except OSError as error:
        raise KeyFileError(f"{file}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise KeyFileError(f"{file}: {error}") from None
    for what in ("name", "sha256"):
        values = [getattr(key, what) for key in wire.keys]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise KeyFileError(f"{file}: two keys have the {what} {twice}")
    return KeyRing(
        hashes=tuple(bytes.fromhex(key.sha256) for key in wire.keys),
        clients=tuple(
            Client(
                name=key.name,
                scopes=frozenset(key.scopes),
                max_requests_in_flight=key.max_requests_in_flight,
                requests_per_minute=key.requests_per_minute,
                priority=key.priority,
            )
            for key in wire.keys
        ),
    )
