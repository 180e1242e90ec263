"""What ``flexctl history`` shows of the daemon's answer."""

from typing import Any

from flexpiped.flexctl.commands import history_lines

_STARTED = {"kind": "daemon", "message": "starting", "time_unix_s": 0.0, "fields": {}}


def answer(**changed: Any) -> dict[str, Any]:
    return {"events": [_STARTED], "intent": None, "incomplete_since_start": None, **changed}


def test_events_and_what_a_restart_begins_with() -> None:
    stages = [{"device_ids": ["cpu:0"], "first_decoder": 0, "end_decoder": 8}]
    intent = {"engine": "fake", "stages": stages, "further_replicas": [], "reason": "asked for", "since_unix_s": 0.0}

    event, begins = history_lines(answer(intent=intent))

    assert event.endswith("daemon            starting")
    assert begins.startswith("a restart begins with 1 stage of fake (asked for, ")


def test_what_could_not_be_written_is_told() -> None:
    lines = history_lines(answer(incomplete_since_start="/x/journal.db: database or disk is full"))

    assert lines[-1] == "incomplete since the daemon started: /x/journal.db: database or disk is full"
