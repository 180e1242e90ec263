"""How much memory is left on a host and in a cgroup, read from files as the kernel writes them."""

from pathlib import Path

import pytest

from topology.host_memory import FreeMemory, free_host_memory, host_memory_bytes
from topology.units import GIB, MIB

MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\n"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def procfs(tmp_path: Path) -> Path:
    write(tmp_path / "proc", meminfo=MEMINFO)
    return tmp_path / "proc"


def found(procfs: Path) -> FreeMemory | None:
    return free_host_memory(procfs=procfs, cgroupfs=procfs.with_name("cgroup"))


def test_of_a_host_without_cgroups_it_is_what_the_kernel_calls_available(procfs: Path) -> None:
    assert found(procfs) == FreeMemory(free_bytes=8 * GIB, bound="the host")


def test_where_the_kernel_says_nothing_it_is_not_known(tmp_path: Path) -> None:
    assert found(tmp_path / "nowhere") is None


def test_the_tightest_cgroup_around_us_bounds_it(procfs: Path) -> None:
    write(procfs / "self", cgroup="0::/ml.slice/flexpiped.service\n")
    slice_ = procfs.with_name("cgroup") / "ml.slice"
    write(slice_, memory__max=f"{4 * GIB}", memory__current=f"{3 * GIB}", memory__stat=f"inactive_file {256 * MIB}\n")
    write(slice_ / "flexpiped.service", memory__max="max", memory__current=f"{GIB}", memory__stat="inactive_file 1\n")
    assert found(procfs) == FreeMemory(free_bytes=GIB + 256 * MIB, bound=str(slice_))


def test_a_cgroup_with_more_room_than_the_host_bounds_nothing(procfs: Path) -> None:
    write(procfs / "self", cgroup="0::/big\n")
    write(procfs.with_name("cgroup") / "big", memory__max=f"{64 * GIB}", memory__current="0", memory__stat="")
    assert found(procfs) == FreeMemory(free_bytes=8 * GIB, bound="the host")


def test_version_1_of_cgroups_is_read_as_well_and_in_a_container_its_root(procfs: Path) -> None:
    write(procfs / "self", cgroup="5:devices:/\n4:memory:/not/seen/from/here\n0::/\n")
    root = procfs.with_name("cgroup") / "memory"
    write(
        root,
        memory__limit_in_bytes=f"{2 * GIB}\n",
        memory__usage_in_bytes=f"{GIB}\n",
        memory__stat=f"cache 5\ntotal_inactive_file {MIB}\n",
    )
    assert found(procfs) == FreeMemory(free_bytes=GIB + MIB, bound=str(root))


def test_this_machine_says_something() -> None:
    here = free_host_memory()
    assert here is not None
    assert here.free_bytes > 0


def test_all_there_is_is_the_memory_of_the_host_or_the_smallest_limit_around_us(procfs: Path, tmp_path: Path) -> None:
    cgroupfs = procfs.with_name("cgroup")
    assert host_memory_bytes(procfs=procfs, cgroupfs=cgroupfs) == 16 * GIB
    write(procfs / "self", cgroup="0::/ml.slice/flexpiped.service\n")
    write(cgroupfs / "ml.slice", memory__max=f"{4 * GIB}\n")
    write(cgroupfs / "ml.slice" / "flexpiped.service", memory__max="max\n")
    assert host_memory_bytes(procfs=procfs, cgroupfs=cgroupfs) == 4 * GIB
    assert host_memory_bytes(procfs=tmp_path / "nowhere", cgroupfs=cgroupfs) is None
