"""What an engine leaves behind goes with its run directory, and only that."""

import os
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from engines.served.run_directory import (
    make_run_directory,
    note_shared_memory,
    remove_run_directory,
    shared_memory_of,
    sweep,
)


@pytest.fixture
def mapped() -> shared_memory.SharedMemory:
    return shared_memory.SharedMemory(create=True, size=4096)


def there(name: str) -> bool:
    return (Path("/dev/shm") / name).exists()


def test_it_is_private_and_short_enough_for_sockets() -> None:
    directory = make_run_directory()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert len(str(directory / "00000000-0000-0000-0000-000000000000")) < 108
    remove_run_directory(directory)
    assert not directory.exists()


def test_shared_memory_that_was_noted_goes_and_no_other(tmp_path: Path, mapped: shared_memory.SharedMemory) -> None:
    other = shared_memory.SharedMemory(create=True, size=4096)
    directory = tmp_path / "run"
    directory.mkdir()
    assert {mapped.name, other.name} <= shared_memory_of(os.getpid())
    (directory / "shared-memory").write_text(f"{mapped.name}\n../etc/passwd\n")

    remove_run_directory(directory)

    assert not there(mapped.name)
    assert there(other.name)
    other.close()
    other.unlink()
    mapped.close()
    with pytest.raises(FileNotFoundError):
        mapped.unlink()


def test_names_are_added_to_those_known(tmp_path: Path, mapped: shared_memory.SharedMemory) -> None:
    (tmp_path / "shared-memory").write_text("gone-by-now\n")
    note_shared_memory(tmp_path, [os.getpid(), 2**22 + 1])
    assert {"gone-by-now", mapped.name} <= set((tmp_path / "shared-memory").read_text().split())
    mapped.close()
    mapped.unlink()


def test_directories_of_daemons_that_are_gone_are_swept(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as child:
        pass
    owners = {"dead": f"{child.pid} 17", "reused": f"{os.getpid()} 17", "young": None, "full-disk": "", "torn": "x"}
    for name, owner in owners.items():
        directory = tmp_path / f"flexpiped-engine-{name}"
        directory.mkdir()
        if owner is not None:
            (directory / "owner").write_text(owner)
    (tmp_path / "other").mkdir()

    sweep(tmp_path)

    unknown = [f"flexpiped-engine-{name}" for name in ("full-disk", "torn", "young")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*unknown, "other"]


def test_a_daemon_that_lives_keeps_its_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first = make_run_directory()
    second = make_run_directory()
    assert first.exists()
    assert second.parent == tmp_path
