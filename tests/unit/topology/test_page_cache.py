"""How much of files is in memory."""

import os
from pathlib import Path

from topology.page_cache import cached_share
from topology.units import MIB


def written(file: Path, size: int) -> Path:
    file.write_bytes(os.urandom(1024) * (size // 1024))
    return file


def test_what_has_just_been_written_is_in_memory(tmp_path: Path) -> None:
    small, large = written(tmp_path / "small", 8192), written(tmp_path / "large", 96 * MIB)
    assert cached_share([small, large]) == 1.0


def test_a_hole_that_nobody_has_read_is_not(tmp_path: Path) -> None:
    """Shares count by bytes: a quarter of these files has been written."""
    hole = tmp_path / "hole"
    with hole.open("wb") as file:
        file.truncate(12 * MIB)
    assert cached_share([hole]) == 0.0
    assert cached_share([hole, written(tmp_path / "there", 4 * MIB)]) == 0.25


def test_nothing_to_read_is_there_and_what_is_gone_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert cached_share([]) == cached_share([tmp_path / "empty"]) == cached_share([tmp_path / "gone"]) == 1.0
