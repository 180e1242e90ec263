"""Whether the memory of processes that were killed is free again."""

import os
import subprocess
import sys
from collections.abc import Collection

import pytest

from engines.errors import EngineStartFailed
from engines.served.freed import AllMemory, Departed, GpuMemory, HostMemory, ProcessId, identify, until_free
from tests.support.fake_nvml import run_program
from topology.gpu_memory import HeldMemory

SLEEPS = (sys.executable, "-S", "-c", "input()")


class Slowly:
    """Memory that is given back after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def held(self, processes: Collection[ProcessId]) -> tuple[str, ...]:
        self.looks -= 1
        return tuple(f"process {process.pid}" for process in processes) if self.looks >= 0 else ()

    def keeps(self, pids: Collection[int]) -> tuple[HeldMemory, ...]:
        """Be what a driver says."""
        self.looks -= 1
        return tuple(HeldMemory(pid=pid, uuid="GPU-1", used_bytes=3 << 30) for pid in pids if self.looks >= 0)


def gone() -> ProcessId:
    """Return a process that has ended."""
    with subprocess.Popen(SLEEPS, stdin=subprocess.DEVNULL) as process:
        (found,) = identify([process.pid])
        process.kill()
    return found


def test_a_process_holds_memory_until_it_ends() -> None:
    with subprocess.Popen(SLEEPS, stdin=subprocess.PIPE) as process:
        processes = identify([process.pid])
        (held,) = HostMemory().held(processes)
        assert held.startswith(f"process {process.pid} with ")
        process.kill()
    assert HostMemory().held(processes) == ()
    assert identify([process.pid]) == set()


def test_another_process_of_the_same_number_is_not_it() -> None:
    assert HostMemory().held([ProcessId(os.getpid(), "1")]) == ()


async def test_what_is_held_for_long_is_named() -> None:
    assert await until_free([ProcessId(7, "1")], Slowly(10**9), deadline_s=0.1) == ("process 7",)


async def test_a_start_waits_for_the_memory_of_its_devices() -> None:
    check = Slowly(20)
    departed = Departed(check)
    departed.note(["gpu:0"], [ProcessId(7, "1")])
    await departed.ensure_free(["gpu:0", "gpu:1"], deadline_s=30.0)
    assert check.looks < 0


async def test_memory_that_stays_held_is_not_planned_again() -> None:
    departed = Departed(Slowly(10**9))
    departed.note(["gpu:0"], [ProcessId(7, "1")])
    departed.note(["gpu:2"], [ProcessId(8, "1")])
    await departed.ensure_free(["gpu:1"], deadline_s=30.0)
    with pytest.raises(EngineStartFailed, match=r"not free on gpu:0: process 7$"):
        await departed.ensure_free(["gpu:0"], deadline_s=0.1)


async def test_a_start_waits_until_the_driver_has_taken_the_memory_of_a_dead_process_back() -> None:
    driver, dead = Slowly(20), gone()
    departed = Departed(AllMemory(HostMemory(), GpuMemory(driver.keeps)))
    departed.note(["GPU-1"], [dead])
    await departed.ensure_free(["GPU-1"], deadline_s=30.0)
    assert driver.looks < 0


async def test_what_a_driver_keeps_for_a_dead_process_is_named() -> None:
    dead = gone()
    departed = Departed(AllMemory(HostMemory(), GpuMemory(Slowly(10**9).keeps)))
    departed.note(["GPU-1"], [dead])
    with pytest.raises(EngineStartFailed, match=rf"not free on GPU-1: process {dead.pid} with 3 GiB of GPU-1$"):
        await departed.ensure_free(["GPU-1"], deadline_s=0.2)


def test_memory_of_another_process_of_the_same_number_is_not_waited_for() -> None:
    assert GpuMemory(Slowly(10**9).keeps).held([ProcessId(os.getpid(), "1")]) == ()


_ENSURE_FREE = """
import asyncio, sys
from engines.errors import EngineStartFailed
from engines.served.freed import Departed, ProcessId
departed = Departed()
departed.note(["GPU-1"], [ProcessId(int(sys.argv[1]), "1")])
try:
    asyncio.run(departed.ensure_free(["GPU-1"], deadline_s=0.2))
except EngineStartFailed as error:
    print(error)
"""


def test_the_library_of_the_driver_is_asked() -> None:
    pid = gone().pid
    held = run_program(_ENSURE_FREE, str(pid), count=2, held=f"1:{pid}:300,0:{pid + 1}:500")
    uuid = "GPU-00001111-0000-0000-0000-000000000001"
    assert held.strip().endswith(f"is not free on GPU-1: process {pid} with 300 MiB of {uuid}")
    assert run_program(_ENSURE_FREE, str(pid), count=2, held=f"0:{pid + 1}:500") == ""
    assert run_program(_ENSURE_FREE, str(pid), with_library=False) == ""
