"""A vLLM that outlives the daemon, in a machine that a real systemd has booted."""

from tests.packaging.engine_service import EngineSurvival
from tests.packaging.test_service import package
from tests.packaging.test_vllm_service import machine, pytestmark, served

__all__ = ["machine", "package", "pytestmark", "served"]  # fixtures are found by their names


class TestVllmSurvival(EngineSurvival):
    pass
