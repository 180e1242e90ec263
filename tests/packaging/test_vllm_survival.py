"""A vLLM that outlives the daemon, in a machine that a real systemd has booted: in a unit of its own, with its keeper.

One machine for all of it, so the tests stand in the order in which an operator does these things.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.test_service import (  # fixtures are found by their names
    CONFIG,
    START_DEADLINE_S,
    came_back,
    completion,
    journal,
    package,
    pytestmark,
    shown,
)
from tests.packaging.test_survival import cgroup, engine, units
from tests.support.machine import Machine, machine_in, until
from tests.support.vllm import interpreter

__all__ = ["package", "pytestmark"]
VLLM = "/srv/vllm"  # its environment, inside
NUMA = "/usr/lib/x86_64-linux-gnu/libnuma.so.1"  # vLLM's build for the CPU needs it of the host


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Iterator[Machine]:
    environment = Path(interpreter()).parents[1]
    bind = [f"--bind-ro={package.parent}:/srv/dist", f"--bind-ro={environment}:{VLLM}", f"--bind-ro={NUMA}"]
    with machine_in(tmp_path_factory.mktemp("machine"), bind=bind) as machine:
        machine.boot()
        machine.do("dpkg", "--install", f"/srv/dist/{package.name}")
        yield machine


def test_its_keeper_is_in_a_unit_of_its_own_and_all_of_vllm_with_it(machine: Machine) -> None:
    machine.write(
        CONFIG,
        'engine = "vllm"\nstages = 3\ndtype = "float32"\n[engines]\nsurvive_restart = true\n'
        f'[engines.vllm]\npython = "{VLLM}/bin/python"\nkv_cache = "32 MiB"\n'
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
    text, pid, daemon = completion(machine), engine(machine), shown(machine, "MainPID")
    match how:
        case "restart":
            machine.do("systemctl", "restart", "flexpiped")
        case "kill":
            machine.do("kill", "-9", daemon)
        case _:
            machine.do("dpkg", "--install", f"/srv/dist/{package.name}")

    until(lambda: came_back(machine, instead_of=daemon), deadline_s=START_DEADLINE_S)

    adopted = [entry["pid"] for entry in journal(machine) if entry["event"] == "engine adopted"]
    assert (engine(machine), adopted[-1]) == (pid, pid)
    assert completion(machine) == text
    machine.do("flexctl", "rebalance", "--stages", "2", "--wait")
    assert completion(machine) == text
    machine.do("flexctl", "rebalance", "--stages", "3", "--wait")


def test_stopping_the_service_ends_all_of_it(machine: Machine) -> None:
    machine.do("systemctl", "stop", "flexpiped")

    assert shown(machine, "Result") == "success"
    until(lambda: machine.run("pgrep", "-u", "flexpiped").stdout == "", deadline_s=30.0)
    assert units(machine) == []
    assert machine.do("sh", "-c", "ls /var/lib/flexpiped/run") == ""
