"""Engines that outlive the daemon, in a machine that a real systemd has booted: units of their own, without any right.

One machine for all of it, so the tests stand in the order in which an operator does these things.
"""

import json
from pathlib import Path

import pytest

from tests.packaging.test_service import (  # fixtures are found by their names
    CONFIG,
    START_DEADLINE_S,
    came_back,
    completion,
    events,
    journal,
    machine,
    package,
    pytestmark,
    shown,
    started,
)
from tests.support.machine import ENGINE_PYTHON, Machine, until

__all__ = ["machine", "package", "pytestmark"]


def records(machine: Machine) -> list[dict[str, object]]:
    files = machine.run("sh", "-c", "ls /var/lib/flexpiped/engines/*/*.json").stdout.split()
    return [json.loads(machine.do("cat", file)) for file in files]


def engine(machine: Machine) -> int:
    [record] = records(machine)
    return int(str(record["pid"]))


def units(machine: Machine) -> list[str]:
    """Return the units of engines that run."""
    listed = machine.do("systemctl", "list-units", "--plain", "--no-legend", "flexpiped-engine@*").splitlines()
    return [line.split()[0] for line in listed if " running " in line]


def cgroup(machine: Machine, pid: int) -> str:
    return machine.do("cat", f"/proc/{pid}/cgroup").strip()


def assert_adopted_after(machine: Machine, package: Path, how: str, *, stages: int, others: int) -> None:
    """The daemon goes and comes back; its engine is the same, says the same, and goes to other stages and back."""
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
    machine.do("flexctl", "rebalance", "--stages", str(others), "--wait")
    assert completion(machine) == text
    machine.do("flexctl", "rebalance", "--stages", str(stages), "--wait")


def test_an_engine_is_in_a_unit_of_its_own(machine: Machine) -> None:
    machine.write(
        CONFIG,
        'engine = "native"\nstages = 2\n[engines]\nsurvive_restart = true\n'
        f'[engines.native]\npython = "{ENGINE_PYTHON}"\n',
    )
    started(machine)
    [unit] = units(machine)
    assert cgroup(machine, engine(machine)).endswith(f"/{unit}")
    assert machine.do("systemctl", "show", unit, "--property", "User", "--value").strip() == "flexpiped"
    assert completion(machine).strip()


@pytest.mark.parametrize("how", ["restart", "kill", "upgrade"])
def test_it_stays_and_is_adopted(machine: Machine, package: Path, how: str) -> None:
    assert_adopted_after(machine, package, how, stages=2, others=4)


def test_stopping_the_service_ends_it(machine: Machine) -> None:
    machine.do("systemctl", "stop", "flexpiped")

    assert shown(machine, "Result") == "success"
    until(lambda: machine.run("pgrep", "-u", "flexpiped").stdout == "", deadline_s=20.0)
    assert units(machine) == []
    assert machine.run("systemctl", "is-active", "flexpiped-engine.socket").stdout.strip() == "active"


def test_after_a_stop_another_one_is_started(machine: Machine) -> None:
    before = [entry for entry in events(machine) if entry == "engine adopted"]
    started(machine)
    assert len(units(machine)) == 1
    assert [entry for entry in events(machine) if entry == "engine adopted"] == before


def test_only_the_user_of_the_daemon_may_have_engines_started(machine: Machine) -> None:
    assert machine.do("stat", "-c", "%a %U", "/run/flexpiped-engine.sock").split() == ["600", "flexpiped"]


def test_removing_the_package_ends_it(machine: Machine) -> None:
    machine.do("dpkg", "--remove", "flexpiped")

    until(lambda: machine.run("pgrep", "-u", "flexpiped").stdout == "", deadline_s=20.0)
    assert machine.run("test", "-e", "/run/flexpiped-engine.sock").returncode != 0
