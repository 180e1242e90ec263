"""What speaks against adopting an engine: its process, and what it was started for."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from engines.records import (
    EngineRecord,
    InvalidRecord,
    ProcessFacts,
    Purpose,
    against_ownership,
    against_purpose,
    facts_of,
    read_record,
    write_record,
)

PURPOSE = Purpose(
    engine="native", model="/srv/m", files="f", options="o", protocol="p", basis={"stages": "2", "devices.kind": "cpu"}
)
RECORD = EngineRecord(
    purpose=PURPOSE,
    name="m",
    pid=4711,
    start="100",
    boot="this boot",
    socket="/run/x.sock",
    flexpiped="0.1",
    since_unix_s=1.0,
)
FACTS = ProcessFacts(start="100", owner=7, boot="this boot")


def test_its_own_process_is_known_by_start_time_boot_and_owner() -> None:
    assert against_ownership(RECORD, FACTS, uid=7) == ""


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (replace(FACTS, boot="another"), "the host was booted since"),
        (replace(FACTS, start="", owner=None), "process 4711 has ended"),
        (replace(FACTS, start="101"), "process 4711 is another one by now"),  # the pid was given out again
        (replace(FACTS, owner=8), "process 4711 belongs to another user"),
    ],
)
def test_what_is_not_provably_its_own_is_not(facts: ProcessFacts, reason: str) -> None:
    assert against_ownership(RECORD, facts, uid=7) == reason


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (PURPOSE, ""),
        (replace(PURPOSE, engine="vllm"), "engine was native and is vllm now"),
        (replace(PURPOSE, model="/srv/other"), "model was /srv/m and is /srv/other now"),
        (
            replace(PURPOSE, basis={"stages": "3", "devices.kind": "cpu"}),
            "stages was 2 and is 3 in the configuration now",
        ),
        (replace(PURPOSE, files="g"), "the model's files have changed"),
        (replace(PURPOSE, options="q"), "it was started with other options"),
        (replace(PURPOSE, protocol="r"), "flexpiped 0.1, which started it, spoke with it in another way"),
    ],
)
def test_only_what_is_asked_for_is_adopted(wanted: Purpose, reason: str) -> None:
    assert against_purpose(RECORD, wanted) == reason


def test_a_record_is_for_its_owner_only_and_comes_back_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "engines" / "one.json"
    write_record(file, RECORD)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o077 == 0
    assert read_record(file) == RECORD
    assert [each.name for each in file.parent.iterdir()] == ["one.json"]


def test_what_others_could_have_written_is_no_record(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    write_record(file, RECORD)
    file.chmod(0o622)
    with pytest.raises(InvalidRecord, match="others could have written it"):
        read_record(file)


@pytest.mark.parametrize("text", ["", "{}", "[1]"])
def test_what_is_none_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "one.json"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(InvalidRecord, match=r"one\.json"):
        read_record(file)


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    write_record(file, replace(RECORD, version=99))
    with pytest.raises(InvalidRecord, match="version 99"):
        read_record(file)


def test_the_kernel_knows_this_process() -> None:
    mine = facts_of(os.getpid())
    record = replace(RECORD, pid=os.getpid(), start=mine.start, boot=mine.boot)
    assert against_ownership(record, mine, uid=os.getuid()) == ""
