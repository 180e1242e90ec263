"""Whether the memory of processes that were killed is free again."""

import os
import subprocess
import sys
from collections.abc import Collection

import pytest

from engines.errors import EngineStartFailed
from engines.vllm.freed import Departed, HostMemory, ProcessId, identify, until_free

SLEEPS = (sys.executable, "-S", "-c", "input()")


class Slowly:
    """Memory that is given back after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def held(self, processes: Collection[ProcessId]) -> tuple[str, ...]:
        self.looks -= 1
        return tuple(f"process {process.pid}" for process in processes) if self.looks >= 0 else ()


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
    assert await until_free([ProcessId(7, "1")], Slowly(10**9), deadline_s=5.0) == ("process 7",)


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
        await departed.ensure_free(["gpu:0"], deadline_s=30.0)
