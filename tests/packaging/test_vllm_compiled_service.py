"""Real vLLM in compiled mode under the unit: the sandbox lets it compile at its start, and again after a move.

The machine has what the README has an operator install for that.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging import test_service
from tests.packaging.engine_service import Served, layout, machine_with
from tests.packaging.test_service import CONFIG, completion, events, package, processes, shown, started
from tests.support.machine import Machine, until
from tests.support.vllm import interpreter

__all__ = ["package", "pytestmark"]  # fixtures are found by their names
pytestmark = [*test_service.pytestmark, pytest.mark.vllm]
PACKAGES = ("g++", "libnuma1", "openssl")
OWN = 'kv_cache = "64 MiB"\ncompile = true\n'
SERVED = Served(name="vllm", more="max_model_len = 512\n", own=OWN)
COMPILED = "/var/cache/flexpiped/vllm/torch_compile_cache"
DEADLINE_S = 400.0  # two helpers compile beside the ranks, on a machine that other work keeps busy


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    with machine_with(folder, package, name="vllm", python=interpreter(), packages=PACKAGES) as machine:
        yield machine


def test_it_compiles_at_its_start_and_again_after_a_move(machine: Machine) -> None:
    machine.write(CONFIG, SERVED.config(stages=2))
    started(machine)
    assert runs(machine) == ["compiled", "compiled"]
    text = completion(machine)
    assert text.strip()
    assert {owner for _, owner in kernels(machine)} == {"flexpiped"}
    at_start = kernels(machine)

    machine.do("flexctl", "rebalance", "--layout", layout(machine, cut=6), "--wait")
    assert completion(machine) == text
    until(
        lambda: "compiled again after a move" in events(machine),
        deadline_s=DEADLINE_S,
        says=lambda: f"{events(machine)[-5:]}",
    )

    assert runs(machine) == ["compiled", "compiled"]
    assert completion(machine) == text
    assert kernels(machine) > at_start
    assert "stays eager after a move" not in events(machine)


def test_started_again_it_finds_what_was_compiled(machine: Machine) -> None:
    text, before = completion(machine), processes(machine)
    found = kernels(machine)
    machine.do("systemctl", "restart", "flexpiped")

    assert not before & processes(machine)
    assert runs(machine) == ["compiled", "compiled"]
    assert completion(machine) == text
    assert kernels(machine) == found
    assert shown(machine, "ActiveState") == "active"


def runs(machine: Machine) -> list[str]:
    """Return what the ranks run, as the last column of the status has it."""
    stages = [line for line in machine.do("flexctl", "status").splitlines() if " cpu:" in line]
    return [line.split()[-1] for line in stages]


def kernels(machine: Machine) -> set[tuple[str, str]]:
    """Return the libraries that vLLM's compile cache has, with their owners."""
    listed = machine.do("find", COMPILED, "-name", "*.so", "-printf", "%p %u\\n").splitlines()
    return {(path, owner) for path, _, owner in (line.rpartition(" ") for line in listed)}
