"""Real vLLM under the unit, in a machine that a real systemd has booted: the sandbox leaves it what it needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging import test_service
from tests.packaging.engine_service import EngineService, Served, machine_with
from tests.packaging.test_service import package
from tests.support.machine import NUMA, Machine
from tests.support.vllm import interpreter

__all__ = ["package", "pytestmark"]  # fixtures are found by their names
pytestmark = [*test_service.pytestmark, pytest.mark.vllm]
# without a C++ compiler torch can compile nothing
OWN = 'kv_cache = "64 MiB"\nenv = { TORCHDYNAMO_DISABLE = "1" }\n'


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    numa = f"{Path(NUMA).resolve()}:{NUMA}"
    with machine_with(folder, package, name="vllm", python=interpreter(), bind=[numa]) as machine:
        yield machine


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(name="vllm", more="max_model_len = 512\n", own=OWN)


class TestVllmService(EngineService):
    pass
