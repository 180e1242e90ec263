"""What the driver keeps for processes, asked of a stand-in for its library."""

import pytest

from tests.support.fake_nvml import run_program

_PROGRAM = """
import sys
from topology.gpu_memory import held_memory
for each in held_memory({7, 8}):
    print(each.pid, each.uuid, each.used_bytes)
"""
GPU_0, GPU_1 = (f"GPU-{index * 0x1111:08x}-0000-0000-0000-{index:012d}" for index in range(2))


def held(**variables: object) -> list[str]:
    return run_program(_PROGRAM, **variables).splitlines()  # type: ignore[arg-type]


@pytest.mark.parametrize("define", ["", "OLD_DRIVER"])
def test_all_gpus_are_asked_and_others_left_out(define: str) -> None:
    found = held(count=2, held="0:7:300,1:7:100,1:9:100", define=define)
    assert found == [f"7 {GPU_0} {300 << 20}", f"7 {GPU_1} {100 << 20}"]


def test_a_size_that_the_driver_hides_is_held_all_the_same() -> None:
    assert held(count=1, held="0:8:-1") == [f"8 {GPU_0} None"]


def test_a_divided_gpu_answers_by_its_instances() -> None:
    (found,) = held(count=1, mig=0, held="0:7:300")
    assert found.startswith("7 MIG-")
    assert found.endswith(str(300 << 20))


@pytest.mark.parametrize("trouble", ["lost", "denied", "gone"])
def test_a_gpu_that_does_not_answer_is_not_waited_for(trouble: str) -> None:
    assert held(count=2, held="0:7:300,1:7:100", **{trouble: 0}) == [f"7 {GPU_1} {100 << 20}"]


def test_without_a_driver_nothing_is_held() -> None:
    assert held(with_library=False) == []
