"""The journal keeps what it has settled through ``kill -9``, and a disk that fails stops nothing."""

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from flexpiped.events import Event, EventKind
from flexpiped.intent import Intent
from flexpiped.journal import Journal, JournalError, ModelState
from tests.support.layouts import even_pipeline

ROOT = Path(__file__).parents[2]
DAY_S = 86400.0


def journal_in(folder: Path, *, instance: str = "one", now_s: float = 1000.0) -> Journal:
    return Journal(
        folder / "journal.db", instance=instance, keep_s=DAY_S, on_failure=pytest.fail, wall_clock=lambda: now_s
    )


def event(number: int, *, kind: EventKind = EventKind.DAEMON, time_unix_s: float = 1000.0) -> Event:
    return Event(
        sequence=number, time_unix_s=time_unix_s, kind=kind, message=f"event {number}", fields={"number": number}
    )


def intent(stages: int) -> Intent:
    return Intent(engine="fake", pipelines=(even_pipeline(stages),), basis={}, reason="test", since_unix_s=1.0)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = journal_in(tmp_path)
    journal.open()
    yield journal
    journal.close()


def numbers(journal: Journal, **chosen: object) -> list[int]:
    return [row["fields"]["number"] for row in journal.history(limit=100, **chosen)]  # type: ignore[arg-type]


async def test_what_is_recorded_is_there_once_settled(journal: Journal) -> None:
    for number in range(5):
        journal.record(event(number), intent(number + 1) if number % 2 else None)
    await journal.settled()

    assert numbers(journal) == [0, 1, 2, 3, 4]
    assert [row["fields"]["number"] for row in journal.history(limit=2)] == [3, 4]
    stored = journal.stored()
    assert stored is not None
    assert stored.intent.pipeline == even_pipeline(4)


async def test_kinds_are_chosen_and_daemons_kept_apart(journal: Journal, tmp_path: Path) -> None:
    other = journal_in(tmp_path, instance="two")
    other.open()
    journal.record(event(1), None)
    journal.record(event(2, kind=EventKind.ENGINE), None)
    other.record(event(3), intent(2))
    await journal.settled()
    await other.settled()

    assert numbers(journal, kinds=["engine"]) == [2]
    assert numbers(other) == [3]
    assert journal.stored() is None
    other.close()


async def test_starts_that_do_not_get_ready_are_counted_however_they_end(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.open()
    journal.record(event(1), intent(2))
    await journal.settled()
    for starts in range(3):
        assert fruitless_starts(journal) == starts
        journal.begin_start()
        journal.close()  # in good order: the start failed, or took too long for the service manager
        journal = journal_in(tmp_path)
        journal.open()

    journal.got_ready()
    journal.close()

    later = journal_in(tmp_path)
    later.open()
    assert fruitless_starts(later) == 0
    later.forget_intent()
    assert later.stored() is None
    later.close()


def fruitless_starts(journal: Journal) -> int:
    stored = journal.stored()
    assert stored is not None
    return stored.fruitless_starts


async def test_old_events_go_and_the_intent_stays(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.open()
    journal.record(event(1), intent(2))
    journal.record(event(2, time_unix_s=1000.0 + DAY_S), None)
    journal.close()

    later = journal_in(tmp_path, now_s=1001.0 + DAY_S)
    later.open()
    assert numbers(later) == [2]
    assert later.stored() is not None
    later.close()


def test_a_file_that_is_none_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"no database at all" * 100)
    journal = journal_in(tmp_path)

    with pytest.raises(JournalError, match="not a database; move it away for a new one"):
        journal.open()
    journal.record(event(1), None)
    with pytest.raises(JournalError, match="not a database"):
        journal.history(limit=1)
    journal.close()


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalError, match="newer flexpiped"):
        journal_in(tmp_path).open()


async def test_a_write_that_fails_is_told_once_and_raises_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    journal = Journal(tmp_path / "journal.db", instance="one", keep_s=DAY_S, on_failure=told.append)
    journal.open()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        db.execute("DROP TABLE events")
    for number in range(3):
        journal.record(event(number), None)
    await journal.settled()

    assert len(told) == 1
    assert "no such table" in told[0]
    assert "no such table" in journal.failure
    journal.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from tests.unit.test_journal import event, intent
from flexpiped.journal import Journal

async def main() -> None:
    journal = Journal(Path(sys.argv[1]), instance="one", keep_s=1e9, on_failure=sys.exit, wall_clock=lambda: 1000.0)
    journal.open()
    for number in range(int(sys.argv[2]), 1_000_000):
        journal.record(event(number), intent(1 + number % 8))
        await journal.settled()
        print(number, flush=True)

asyncio.run(main())
"""


def test_kill_9_at_any_moment_loses_nothing_that_was_settled(tmp_path: Path) -> None:
    rng, file, acknowledged = random.Random(0), tmp_path / "journal.db", -1
    for _ in range(5):
        argv = [sys.executable, "-c", WRITER, str(file), str(acknowledged + 2)]
        with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(rng.randrange(1, 60)):
                acknowledged = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split("\n")[:-1]  # the last line may be half
            acknowledged = int(rest[-1]) if rest else acknowledged

        journal = journal_in(tmp_path)
        journal.open()
        with closing(sqlite3.connect(file)) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        last = journal.history(limit=1)[0]["fields"]["number"]
        assert last in (acknowledged, acknowledged + 1)
        stored = journal.stored()
        assert stored is not None
        assert stored.intent.pipeline == even_pipeline(1 + last % 8)  # the two are one transaction
        journal.close()
        acknowledged = last


async def test_who_waits_no_longer_takes_no_row_back(journal: Journal) -> None:
    journal.record(event(1), None)
    waiting = asyncio.create_task(journal.settled())
    await asyncio.sleep(0)
    waiting.cancel()
    await journal.settled()
    assert numbers(journal) == [1]


def test_models_have_intents_and_states_of_their_own_and_the_old_row_is_that_of_the_model_without_a_table(
    tmp_path: Path,
) -> None:
    journal = journal_in(tmp_path)
    journal.open()
    journal.record(event(1), intent(2))
    journal.of_model("a").record(event(2), intent(3))
    journal.of_model("a").keep_state(ModelState(is_stopped=True, path="/srv/other", configured="/srv/a"))
    journal.close()

    again = journal_in(tmp_path)
    again.open()
    stored = [each.stored() for each in (again, again.of_model(""), again.of_model("a"), again.of_model("b"))]
    assert [None if each is None else each.intent.pipeline.granularity for each in stored] == [2, 2, 3, None]
    assert again.of_model("a").state() == ModelState(is_stopped=True, path="/srv/other", configured="/srv/a")
    assert again.state() is None
    assert [each["message"] for each in again.history(limit=9)] == ["event 1", "event 2"]  # of the whole daemon
    again.of_model("a").forget_intent()
    assert again.stored() is not None
    again.close()
