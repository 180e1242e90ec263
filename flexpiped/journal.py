"""The journal: what should be running and what has happened, in an SQLite file that survives ``kill -9`` at any moment.

One thread owns the connection that writes, so the event loop never waits for a disk. An event and the intent that
follows from it are one transaction. Whoever answers a client waits for ``settled`` first: what was promised is on disk.
Rows belong to an ``instance`` (the admin socket), for several daemons may keep their state in one place.

JournalError   the file cannot be used; the daemon goes on without it and says so
"""

import asyncio
import copy
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from flexpiped.events import Event
from flexpiped.intent import Intent, InvalidIntent, intent_from_json, intent_to_wire
from flexpiped.settings import JournalSettings
from topology.measured import state_file

_SCHEMA_VERSION: Final = 1
_BUSY_S: Final = 5.0  # another daemon may be writing
_PRUNE_EVERY: Final = 1000  # events
_DAY_S: Final = 86400.0
_BROKEN: Final = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, instance TEXT NOT NULL, time_unix_s REAL NOT NULL,
    kind TEXT NOT NULL, message TEXT NOT NULL, fields TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS events_of_instance ON events (instance, id);
CREATE TABLE IF NOT EXISTS intents (
    instance TEXT PRIMARY KEY, intent TEXT NOT NULL, fruitless_starts INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS models (
    instance TEXT PRIMARY KEY, is_stopped INTEGER NOT NULL, path TEXT NOT NULL, configured TEXT NOT NULL) WITHOUT ROWID;
"""


class JournalError(Exception):
    """The journal cannot be used; the message says which file and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The last intent, and how many starts with it in a row have not got ready."""

    intent: Intent
    fruitless_starts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """What was asked for of a model by hand: stopped, or other files than the configuration said then (empty: none)."""

    is_stopped: bool
    path: str
    configured: str


@dataclass(slots=True)
class _Shared:
    """What the views of one journal have in common."""

    connection: sqlite3.Connection | None = None
    last: Future[None] | None = None
    written: int = 0
    failure: str = ""


class Journal:
    """The rows of one daemon. ``record`` and ``settled`` belong to the event loop; the other methods block.

    Args:
        keep_s: Events older than this are removed; the intent stays.
        on_failure: Told once, from the journal's thread, when a write has failed.
    """

    def __init__(
        self,
        file: Path,
        *,
        instance: str,
        keep_s: float,
        on_failure: Callable[[str], object],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = file
        self._instance = instance
        self._keep_s = keep_s
        self._on_failure = on_failure
        self._wall_clock = wall_clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._shared = _Shared()
        self._model = instance

    def of_model(self, table: str) -> "Journal":
        """Return the same journal, with the intent of a model by the name of its table.

        The model without a table has the row that a daemon's only model always had.
        """
        view = copy.copy(self)
        view._model = f"{self._instance} models.{table}" if table else self._instance
        return view

    @property
    def failure(self) -> str:
        """Why something is missing in it; empty: nothing is."""
        return self._shared.failure

    def open(self) -> None:
        """Open the file, making it where there is none.

        Raises:
            JournalError
        """
        try:
            self._thread.submit(self._open).result()
        except (OSError, sqlite3.Error) as error:
            self._thread.shutdown()
            helps = "; move it away for a new one" if getattr(error, "sqlite_errorcode", None) in _BROKEN else ""
            self._shared.failure = f"{self._file}: {error}{helps}"
            raise JournalError(self.failure) from error

    def close(self) -> None:
        """Write what is left, then close. A start that has not ``got_ready`` stays a fruitless one. Idempotent."""
        if self._shared.connection is not None:
            self._thread.submit(self._close).result()
        self._thread.shutdown()

    def record(self, event: Event, intent: Intent | None) -> None:
        """Have an event written, with the intent if the event changes it. Never waits."""
        if self._shared.connection is not None:
            self._shared.last = self._thread.submit(self._guarded, lambda db: self._write(db, event, intent))

    async def settled(self) -> None:
        """Return when everything recorded so far is on disk."""
        if self._shared.last is not None:
            await asyncio.shield(asyncio.wrap_future(self._shared.last))  # one who waits no longer takes no row back

    def begin_start(self) -> None:
        """Note that the daemon starts with the stored intent, before it does."""
        self._update("UPDATE intents SET fruitless_starts = fruitless_starts + 1 WHERE instance = ?")

    def got_ready(self) -> None:
        """Note that the daemon serves with the stored intent. Does not wait."""
        self._update("UPDATE intents SET fruitless_starts = 0 WHERE instance = ?", wait=False)

    def forget_intent(self) -> None:
        """Remove the intent: the configuration decides."""
        self._update("DELETE FROM intents WHERE instance = ?")

    def keep_state(self, state: ModelState) -> None:
        """Keep what was asked for of the model by hand."""
        self._update(
            "INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?)", state.is_stopped, state.path, state.configured
        )

    def state(self) -> ModelState | None:
        """Return what was last asked for of the model by hand. Raises ``JournalError``."""
        rows = self._read("SELECT is_stopped, path, configured FROM models WHERE instance = ?", (self._model,))
        return next((ModelState(is_stopped=bool(row[0]), path=row[1], configured=row[2]) for row in rows), None)

    def stored(self) -> Stored | None:
        """Return the last intent.

        Raises:
            JournalError: It cannot be read.
        """
        rows = self._read("SELECT intent, fruitless_starts FROM intents WHERE instance = ?", (self._model,))
        try:
            return next((Stored(intent=intent_from_json(row[0]), fruitless_starts=row[1]) for row in rows), None)
        except InvalidIntent as error:
            raise JournalError(f"{self._file}: the stored intent is not readable: {error}") from error

    def history(self, *, limit: int, kinds: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Return the last events, oldest first, as JSON values.

        Raises:
            JournalError: They cannot be read.
        """
        chosen = f" AND kind IN ({', '.join('?' * len(kinds))})" if kinds else ""
        rows = self._read(
            "SELECT id, time_unix_s, kind, message, fields FROM events"
            f" WHERE instance = ?{chosen} ORDER BY id DESC LIMIT ?",
            (self._instance, *kinds, limit),
        )
        return [
            {
                "id": row[0],
                "time_unix_s": row[1],
                "kind": row[2],
                "message": row[3],
                "fields": msgspec.json.decode(row[4]),
            }
            for row in reversed(rows)
        ]

    # --- in the journal's thread ---

    def _open(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self._file, timeout=_BUSY_S, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")  # a power cut loses nothing that was settled, either
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > _SCHEMA_VERSION:
                raise sqlite3.DatabaseError(f"written by a newer flexpiped (version {version} of its tables)")
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            self._file.chmod(0o640)
            self._prune(db)
        except BaseException:
            db.close()
            raise
        self._shared.connection = db

    def _close(self) -> None:
        if self._shared.connection is not None:
            self._shared.connection.close()
        self._shared.connection = None

    def _guarded(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Run one transaction. A disk that is full must not end the serving: it is told once, and tried again."""
        db = self._shared.connection
        assert db is not None, "open comes first"
        try:
            db.execute("BEGIN IMMEDIATE")
            try:
                work(db)
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
        except sqlite3.Error as error:
            if not self.failure:
                self._on_failure(f"{self._file}: {error}")
            self._shared.failure = f"{self._file}: {error}"

    def _write(self, db: sqlite3.Connection, event: Event, intent: Intent | None) -> None:
        db.execute(
            "INSERT INTO events (instance, time_unix_s, kind, message, fields) VALUES (?, ?, ?, ?, ?)",
            (self._instance, event.time_unix_s, event.kind.value, event.message, _json(dict(event.fields))),
        )
        if intent is not None:
            db.execute(
                "INSERT INTO intents VALUES (?, ?, 0) ON CONFLICT (instance) DO UPDATE"
                " SET intent = excluded.intent, fruitless_starts = 0",
                (self._model, _json(intent_to_wire(intent))),
            )
        self._shared.written += 1
        if self._shared.written % _PRUNE_EVERY == 0:
            self._prune(db)

    def _prune(self, db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM events WHERE time_unix_s < ?", (self._wall_clock() - self._keep_s,))

    def _update(self, statement: str, *values: object, wait: bool = True) -> None:
        def update(db: sqlite3.Connection) -> None:
            db.execute(statement, (self._model, *values))

        if self._shared.connection is None:
            return
        self._shared.last = self._thread.submit(self._guarded, update)
        if wait:
            self._shared.last.result()

    # --- reading, in the thread that asks ---

    def _read(self, query: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        if self._shared.connection is None:
            raise JournalError(self.failure or f"{self._file}: not open")
        try:
            with closing(sqlite3.connect(f"{self._file.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)) as db:
                return db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise JournalError(f"{self._file}: {error}") from error


def journal_of(
    settings: JournalSettings, *, environment: Mapping[str, str], instance: str, on_failure: Callable[..., object]
) -> Journal:
    """Return the journal of a daemon, not open yet."""
    file = settings.file or state_file(environment, home=Path.home()).with_name("journal.db")
    return Journal(
        file,
        instance=instance,
        keep_s=settings.keep_days * _DAY_S,
        on_failure=lambda reason: on_failure(reason=reason),
    )


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
