"""Files in the kernel's page cache, or not: where a start is to find the parameters of its model."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from planner.start_times import Origin
from tests.bench.tables import say
from topology.page_cache import cached_share
from topology.units import MIB

_MOST_LEFT: Final = 0.1  # of a file in the page cache, for it to count as dropped


def set_up(origin: Origin, files: Sequence[Path]) -> float:
    """Bring the page cache into the state that belongs to an origin; return the share of the files in it.

    Kept parameters are found with the page cache dropped, as after hours in which the host read other files.
    """
    (_read if origin is Origin.PAGE_CACHE else _drop)(files)
    share = cached_share(files)
    if origin is Origin.STORAGE and share > _MOST_LEFT:
        say(f"{share:.0%} of the files stay in the page cache: another process maps them, and this is no cold start")
    return share


def copied(directory: Path, *, into: Path) -> Path:
    """Copy a model, so that nobody else has its files mapped; return where it is."""
    return Path(shutil.copytree(directory, into))


def _drop(files: Sequence[Path]) -> None:
    """Have the kernel forget files; what is pinned or mapped stays."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not written yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read(files: Sequence[Path]) -> None:
    """Have the kernel's page cache hold files."""
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.read(16 * MIB):
                pass
