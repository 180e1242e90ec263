"""Processes that get a share of a core each, by a control group of their own: what a slower core would be to them.

So programs that would be too fast for the few cores of a machine show whether several of them do several times as much.
Needs root and the kernel's ``cpu`` controller, version 1 or 2.

NoShares    there are no such control groups here; the message says what is missing
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

_PERIOD_US: Final = 10_000  # short, so that a process is not held up for long


class NoShares(Exception):
    """No process can be held to a share of a core here."""


@contextmanager
def shares(groups: Iterable[Iterable[int]], share: float) -> Iterator[None]:
    """In this scope the processes of each group have ``share`` of a core together, those that they start included.

    Raises:
        NoShares: It cannot be done here.
    """
    with ExitStack() as stack:
        for index, pids in enumerate(groups):
            stack.enter_context(_held_to(share, pids, name=f"flexpiped-bench-{os.getpid()}-{index}"))
        yield


@contextmanager
def _held_to(share: float, pids: Iterable[int], *, name: str) -> Iterator[None]:
    root = _root()
    group = root / name
    quota_us = round(share * _PERIOD_US)
    try:
        group.mkdir()
        _limit(group, quota_us)
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        raise NoShares(f"{error.filename or group}: {error.strerror}: root and the cpu controller are needed") from None
    try:
        yield
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (root / "cgroup.procs").write_text(pid)
        group.rmdir()


def _root() -> Path:
    for root in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")):  # version 1, version 2
        if (root / "cgroup.procs").exists():
            return root
    raise NoShares("no control groups below /sys/fs/cgroup")


def _limit(group: Path, quota_us: int) -> None:
    if (group / "cpu.cfs_quota_us").exists():
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))
    else:
        (group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
