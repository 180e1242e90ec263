"""Real vLLM under the unit, in a machine that a real systemd has booted: the sandbox leaves it what it needs.

One machine for all of it, so the tests stand in the order in which an operator does these things. vLLM is in an
environment of its own, as on a host: bound read-only into the machine. There is no C++ compiler in it, without which
torch could compile nothing.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.install_vllm import VLLM
from tests.engines.interpreter import ensure_there
from tests.packaging import test_service
from tests.packaging.test_service import (  # fixtures are found by their names
    CONFIG,
    START_DEADLINE_S,
    came_back,
    completion,
    events,
    journal,
    package,
    processes,
    shown,
)
from tests.support.machine import NUMA, Machine, machine_in, until

__all__ = ["package", "pytestmark"]
pytestmark = [*test_service.pytestmark, pytest.mark.vllm]
PYTHON = "/srv/vllm/bin/python"
READY = f"""
engine = "vllm"
stages = 2
dtype = "float32"
max_model_len = 512
[engines.vllm]
python = "{PYTHON}"
kv_cache = "64 MiB"
env = {{ TORCHDYNAMO_DISABLE = "1" }}
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    environment = Path(ensure_there(VLLM)).parent.parent
    bound = (f"{package.parent}:/srv/dist", f"{environment}:/srv/vllm", f"{Path(NUMA).resolve()}:{NUMA}")
    with machine_in(folder, bind=[f"--bind-ro={each}" for each in bound]) as machine:
        machine.boot()
        machine.do("dpkg", "--install", f"/srv/dist/{package.name}")
        yield machine


def test_it_starts_and_serves(machine: Machine) -> None:
    machine.write(CONFIG, READY)

    started = machine.run("systemctl", "start", "flexpiped")
    assert started.returncode == 0, [entry for entry in journal(machine) if entry["level"] == "error"][-3:]

    assert shown(machine, "StatusText") == "serving demo-model, 8 decoder layers in 2 stages"
    assert completion(machine).strip()
    assert machine.do("flexctl", "status").startswith("demo-model   vllm   epoch 0   2 stages")
    owners = machine.do("ps", "-o", "user=", "-p", ",".join(processes(machine))).split()
    assert len(owners) >= 5  # daemon, text process, vLLM's server and engine core, a worker for each rank
    assert set(owners) == {"flexpip+"} or set(owners) == {"flexpiped"}


def test_layers_move_and_a_reload_is_applied(machine: Machine) -> None:
    text = completion(machine)
    machine.do("flexctl", "rebalance", "--layout", layout(machine, cut=6), "--wait")
    assert completion(machine) == text

    machine.write(CONFIG, READY + "[admission]\nmax_requests_queued = 7\n")
    machine.do("systemctl", "reload", "flexpiped")
    until(lambda: "configuration changed and applied" in events(machine), deadline_s=START_DEADLINE_S)
    assert "admission.max_requests_queued = 7" in machine.do("flexctl", "config", "show")


def layout(machine: Machine, *, cut: int) -> str:
    """Write a layout of two stages into a file, and return its name."""
    machine.write(
        "/tmp/layout.json",
        f'{{"stages": [{{"devices": ["cpu:0"], "decoders": [0, {cut}]}}, '
        f'{{"devices": ["cpu:1"], "decoders": [{cut}, 8]}}]}}',
    )
    return "/tmp/layout.json"


def test_killed_it_comes_back_and_nothing_is_left_behind(machine: Machine) -> None:
    text, killed, group = completion(machine), shown(machine, "MainPID"), processes(machine)
    shared = shared_memory(machine)
    machine.do("kill", "-9", killed)

    until(lambda: came_back(machine, instead_of=killed), deadline_s=START_DEADLINE_S)

    assert not group & processes(machine)
    assert completion(machine) == text
    assert not shared & shared_memory(machine)


def shared_memory(machine: Machine) -> set[str]:
    return set(machine.do("ls", "/dev/shm").split())


def test_the_watchdog_ends_one_that_hangs(machine: Machine) -> None:
    machine.write("/run/systemd/system/flexpiped.service.d/watchdog.conf", "[Service]\nWatchdogSec=4\n")
    machine.do("systemctl", "daemon-reload")
    machine.do("systemctl", "restart", "flexpiped")
    hung = shown(machine, "MainPID")

    machine.do("kill", "-STOP", hung)
    until(lambda: came_back(machine, instead_of=hung), deadline_s=START_DEADLINE_S)

    assert "Watchdog timeout (limit 4s)!" in machine.do("journalctl", "--unit", "flexpiped", "--output", "cat")
    assert completion(machine).strip()


def test_what_vllm_says_is_in_the_journal(machine: Machine) -> None:
    said = machine.do("journalctl", "--unit", "flexpiped", "--output", "cat", "--no-pager")

    assert '"daemon ready"' in said
    assert "vllm" in said.lower()


def test_enabled_it_is_there_after_a_reboot_and_stops_in_good_order(machine: Machine) -> None:
    machine.do("systemctl", "enable", "flexpiped")
    machine.power_off()
    machine.boot()
    until(lambda: shown(machine, "ActiveState") == "active", deadline_s=START_DEADLINE_S)
    assert completion(machine).strip()

    machine.do("systemctl", "stop", "flexpiped")

    assert (shown(machine, "Result"), shown(machine, "ExecMainStatus")) == ("success", "0")
    assert machine.run("pgrep", "-u", "flexpiped").stdout == ""
