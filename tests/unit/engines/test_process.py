"""What the kernel says about a process."""

import mmap
import os
import subprocess
import sys

from engines.process import import_root, memory_pss_bytes, usable_cores


def test_memory_grows_by_what_is_touched_and_shrinks_by_what_is_given_back() -> None:
    size = 32 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        before = memory_pss_bytes(os.getpid())
        for offset in range(0, size, mmap.PAGESIZE):
            area[offset] = 1
        after = memory_pss_bytes(os.getpid())
        area.madvise(mmap.MADV_DONTNEED)
        given_back = memory_pss_bytes(os.getpid())
    assert before is not None
    assert after is not None
    assert given_back is not None
    assert after - before > size * 0.9
    assert after - given_back > size * 0.9


def test_a_process_that_is_gone_has_no_memory() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        zombie = memory_pss_bytes(child.pid)
    assert not zombie
    assert memory_pss_bytes(child.pid) is None


def test_usable_cores_are_those_of_this_process() -> None:
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(every)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, every)
    assert usable_cores() == len(every)


def test_an_engine_interpreter_gets_our_packages_and_nothing_else() -> None:
    root = import_root()
    assert {"engines", "planner", "topology"} <= {path.name for path in root.iterdir()}
    assert root.name != "site-packages"
