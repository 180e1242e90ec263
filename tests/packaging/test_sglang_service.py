"""Real SGLang under the unit, in a machine that a real systemd has booted: the sandbox leaves it what it needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexpiped.models import demo_model_places
from tests.packaging import test_service
from tests.packaging.engine_service import EngineService, Served, machine_with
from tests.packaging.test_service import package
from tests.support.checkpoints import make_untied
from tests.support.machine import Machine
from tests.support.sglang import interpreter

__all__ = ["package", "pytestmark"]  # fixtures are found by their names
pytestmark = [*test_service.pytestmark, pytest.mark.sglang]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    model = make_untied(folder / "untied", of=demo_model_places()[0])  # of a tied head SGLang makes no several ranks
    (model / "model.safetensors").chmod(0o644)  # as a download is: the daemon's user reads it
    bind = [f"{model}:/srv/model"]
    with machine_with(folder, package, name="sglang", python=interpreter(), bind=bind) as machine:
        yield machine


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(
        name="sglang", more='model = "/srv/model"\nserved_model_name = "demo-model"\n', own='kv_cache = "64 MiB"\n'
    )


class TestSglangService(EngineService):
    pass
