"""How much memory the processes of this host may take in all, and how much of it is left, within our cgroup's limits.

Another tenant is seen by what is left, whoever it is: of the whole host in ``MemAvailable``, of a cgroup (a container,
a slice of systemd) in its limit less what all of its processes use. Both leave out what the kernel can give up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROCFS: Final = Path("/proc")
CGROUPFS: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """``bound``: what leaves no more: ``the host``, or a cgroup by its folder."""

    free_bytes: int
    bound: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """Where a version of cgroups keeps what is asked here."""

    limit: str
    used: str
    given_up: tuple[str, ...]  # lines of memory.stat: memory in use that the kernel gives up for others


_V1: Final = _Version(limit="memory.limit_in_bytes", used="memory.usage_in_bytes", given_up=("total_inactive_file",))
_V2: Final = _Version(limit="memory.max", used="memory.current", given_up=("inactive_file", "slab_reclaimable"))


def free_host_memory(*, procfs: Path = PROCFS, cgroupfs: Path = CGROUPFS) -> FreeMemory | None:
    """Return the smallest of all that is left here; None where the kernel does not say. Takes about a millisecond."""
    of_host = _host_bytes(procfs / "meminfo", "MemAvailable")
    found = [] if of_host is None else [FreeMemory(free_bytes=of_host, bound="the host")]
    for folder, version in _cgroups(procfs, cgroupfs):
        left = _left_in(folder, version)
        if left is not None:
            found.append(FreeMemory(free_bytes=left, bound=str(folder)))
    return min(found, key=lambda each: each.free_bytes, default=None)


def host_memory_bytes(*, procfs: Path = PROCFS, cgroupfs: Path = CGROUPFS) -> int | None:
    """Return what there is in all, used or not: the host's memory, or the smallest limit; None as above."""
    of_host = _host_bytes(procfs / "meminfo", "MemTotal")
    limits = (next(iter(_lines(folder / version.limit)), "").strip() for folder, version in _cgroups(procfs, cgroupfs))
    found = [int(limit) for limit in limits if limit.isdecimal()]
    return min(found if of_host is None else [*found, of_host], default=None)


def _host_bytes(meminfo: Path, name: str) -> int | None:
    for line in _lines(meminfo):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroups(procfs: Path, cgroupfs: Path) -> Iterator[tuple[Path, _Version]]:
    """Yield the folders of our cgroup and of those around it, as far as they can be seen from here."""
    for line in _lines(procfs / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, version = cgroupfs, _V2
        elif "memory" in controllers.split(","):
            root, version = cgroupfs / "memory", _V1
        else:
            continue
        folder = root / path.strip().lstrip("/")
        while folder != root:
            yield folder, version
            folder = folder.parent
        yield root, version  # in a container, which may not see the names outside, this is its own


def _left_in(folder: Path, version: _Version) -> int | None:
    """Return what is left in a cgroup; None where it has no limit, or is not there."""
    limit, used = (next(iter(_lines(folder / name)), "") for name in (version.limit, version.used))
    if not limit.strip().isdecimal() or not used.strip().isdecimal():  # "max", or no such file
        return None
    stat = dict(line.split() for line in _lines(folder / "memory.stat") if len(line.split()) == 2)
    return int(limit) - int(used) + sum(int(stat.get(name, 0)) for name in version.given_up)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
