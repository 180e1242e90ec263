"""An engine of its own environment under the unit, as tests that each such engine passes in a booted machine.

The environment is bound read-only into the machine, which has no C++ compiler and what a minimal Debian has. A test
file subclasses ``EngineService`` and ``EngineSurvival`` with these fixtures:

- ``machine``: the package is installed there. One for all of a class, so the tests stand in the order in which an
  operator does these things.
- ``served``: the engine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.packaging.test_service import (
    CONFIG,
    START_DEADLINE_S,
    came_back,
    completion,
    events,
    hang,
    journal,
    processes,
    shown,
    started,
)
from tests.packaging.test_survival import assert_adopted_after, cgroup, engine, units
from tests.support.machine import Machine, machine_in, until


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """An engine as the configuration has it."""

    name: str
    more: str = ""  # lines before the engine's table
    own: str = ""  # and in it

    def config(self, *, stages: int, more: str = "") -> str:
        own = f'[engines.{self.name}]\npython = "/srv/{self.name}/bin/python"\n{self.own}'
        return f'engine = "{self.name}"\nstages = {stages}\ndtype = "float32"\n{self.more}{more}{own}'


@contextmanager
def machine_with(
    folder: Path, package: Path, *, name: str, python: str, bind: Sequence[str] = (), packages: Sequence[str] = ()
) -> Iterator[Machine]:
    """Boot a machine with the package installed, and the environment of ``python`` bound to ``/srv/NAME``.

    ``packages`` are Debian's that it has besides.
    """
    bound = (f"{package.parent}:/srv/dist", f"{Path(python).parents[1]}:/srv/{name}", *bind)
    with machine_in(folder, bind=[f"--bind-ro={each}" for each in bound], packages=packages) as machine:
        machine.boot()
        machine.do("dpkg", "--install", f"/srv/dist/{package.name}")
        yield machine


class EngineService:
    """Subclassed once per engine."""

    def test_it_starts_and_serves(self, machine: Machine, served: Served) -> None:
        machine.write(CONFIG, served.config(stages=2))

        started(machine)

        assert shown(machine, "StatusText").endswith("8 decoder layers in 2 stages")
        assert completion(machine).strip()
        assert f"   {served.name}   epoch 0   2 stages" in machine.do("flexctl", "status")
        owners = machine.do("ps", "-o", "user=", "-p", ",".join(processes(machine))).split()
        assert len(owners) >= 5  # daemon, text process, the engine's server, a worker for each rank
        assert set(owners) == {"flexpip+"} or set(owners) == {"flexpiped"}

    def test_layers_move_and_a_reload_is_applied(self, machine: Machine, served: Served) -> None:
        text = completion(machine)
        machine.do("flexctl", "rebalance", "--layout", layout(machine, cut=6), "--wait")
        assert completion(machine) == text

        machine.write(CONFIG, served.config(stages=2) + "[admission]\nmax_requests_queued = 7\n")
        machine.do("systemctl", "reload", "flexpiped")
        until(lambda: "configuration changed and applied" in events(machine), deadline_s=START_DEADLINE_S)
        assert "admission.max_requests_queued = 7" in machine.do("flexctl", "config", "show")

    def test_killed_it_comes_back_and_nothing_is_left_behind(self, machine: Machine) -> None:
        text, killed, group = completion(machine), shown(machine, "MainPID"), processes(machine)
        shared = shared_memory(machine)
        machine.do("kill", "-9", killed)

        until(lambda: came_back(machine, instead_of=killed), deadline_s=START_DEADLINE_S)

        assert not group & processes(machine)
        assert completion(machine) == text
        assert not shared & shared_memory(machine)

    def test_the_watchdog_ends_one_that_hangs(self, machine: Machine) -> None:
        assert "Watchdog timeout (limit 4s)!" in hang(machine)
        assert completion(machine).strip()

    def test_what_the_engine_says_is_in_the_journal(self, machine: Machine, served: Served) -> None:
        assert "daemon ready" in events(machine)
        assert served.name in {entry.get("engine") for entry in journal(machine)}

    def test_enabled_it_is_there_after_a_reboot_and_stops_in_good_order(self, machine: Machine) -> None:
        machine.do("systemctl", "enable", "flexpiped")
        machine.power_off()
        machine.boot()
        until(lambda: shown(machine, "ActiveState") == "active", deadline_s=START_DEADLINE_S)
        assert completion(machine).strip()

        machine.do("systemctl", "stop", "flexpiped")

        assert (shown(machine, "Result"), shown(machine, "ExecMainStatus")) == ("success", "0")
        assert machine.run("pgrep", "-u", "flexpiped").stdout == ""


class EngineSurvival:
    """An engine that outlives the daemon, in a unit of its own with its keeper. Subclassed once per engine."""

    def test_its_keeper_is_in_a_unit_of_its_own_and_all_of_the_engine_with_it(
        self, machine: Machine, served: Served
    ) -> None:
        machine.write(CONFIG, served.config(stages=3, more="engines.survive_restart = true\n"))
        started(machine)
        [unit] = units(machine)
        keeper = engine(machine)
        assert cgroup(machine, keeper).endswith(f"/{unit}")
        assert int(machine.do("sh", "-c", f"grep -l {unit} /proc/[0-9]*/cgroup | wc -l")) > 5
        assert completion(machine).strip()

    @pytest.mark.parametrize("how", ["restart", "kill", "upgrade"])
    def test_it_stays_and_is_adopted(self, machine: Machine, package: Path, how: str) -> None:
        assert_adopted_after(machine, package, how, stages=3, others=2)

    def test_stopping_the_service_ends_all_of_it(self, machine: Machine) -> None:
        machine.do("systemctl", "stop", "flexpiped")

        assert shown(machine, "Result") == "success"
        until(lambda: machine.run("pgrep", "-u", "flexpiped").stdout == "", deadline_s=30.0)
        assert units(machine) == []
        assert machine.do("sh", "-c", "ls /var/lib/flexpiped/run") == ""


def layout(machine: Machine, *, cut: int) -> str:
    """Write a layout of two stages into a file, and return its name."""
    machine.write(
        "/tmp/layout.json",
        f'{{"stages": [{{"devices": ["cpu:0"], "decoders": [0, {cut}]}}, '
        f'{{"devices": ["cpu:1"], "decoders": [{cut}, 8]}}]}}',
    )
    return "/tmp/layout.json"


def shared_memory(machine: Machine) -> set[str]:
    return set(machine.do("ls", "/dev/shm").split())
