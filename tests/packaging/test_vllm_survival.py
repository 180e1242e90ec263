"""A vLLM that outlives the daemon, in a machine that a real systemd has booted: in a unit of its own, with its keeper.

One machine for all of it, so the tests stand in the order in which an operator does these things.
"""

from pathlib import Path

import pytest

from tests.packaging.test_service import CONFIG, completion, package, shown
from tests.packaging.test_survival import assert_adopted_after, cgroup, engine, units
from tests.packaging.test_vllm_service import PYTHON, machine, pytestmark
from tests.support.machine import Machine, until

__all__ = ["machine", "package", "pytestmark"]  # fixtures are found by their names


def test_its_keeper_is_in_a_unit_of_its_own_and_all_of_vllm_with_it(machine: Machine) -> None:
    machine.write(
        CONFIG,
        'engine = "vllm"\nstages = 3\ndtype = "float32"\n[engines]\nsurvive_restart = true\n'
        f'[engines.vllm]\npython = "{PYTHON}"\nkv_cache = "32 MiB"\n'
        'env = {TORCHDYNAMO_DISABLE = "1"}\n',  # the machine has no C++ compiler
    )
    started = machine.run("systemctl", "start", "flexpiped")
    assert started.returncode == 0, machine.do("journalctl", "--output", "cat", "--no-pager", "--lines", "60")
    [unit] = units(machine)
    keeper = engine(machine)
    assert cgroup(machine, keeper).endswith(f"/{unit}")
    assert int(machine.do("sh", "-c", f"grep -l {unit} /proc/[0-9]*/cgroup | wc -l")) > 5
    assert completion(machine).strip()


@pytest.mark.parametrize("how", ["restart", "kill", "upgrade"])
def test_it_stays_and_is_adopted(machine: Machine, package: Path, how: str) -> None:
    assert_adopted_after(machine, package, how, stages=3, others=2)


def test_stopping_the_service_ends_all_of_it(machine: Machine) -> None:
    machine.do("systemctl", "stop", "flexpiped")

    assert shown(machine, "Result") == "success"
    until(lambda: machine.run("pgrep", "-u", "flexpiped").stdout == "", deadline_s=30.0)
    assert units(machine) == []
    assert machine.do("sh", "-c", "ls /var/lib/flexpiped/run") == ""
