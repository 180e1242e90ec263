"""Real SGLang keeps the contract."""

import pytest

from engines.sglang.adapter import SglangEngine
from planner.layout import Pipeline
from tests.contract.engine_contract import EngineContract
from tests.support.vllm import layout

pytestmark = [
    pytest.mark.engine,
    pytest.mark.sglang,
    pytest.mark.real_loop,
    pytest.mark.asyncio(loop_scope="session"),
]


@pytest.fixture
def disposable_engine(engine: SglangEngine) -> SglangEngine:
    """The engine of all: a start takes a minute, and the test that closes it is the last."""
    return engine


@pytest.fixture(scope="module")
def targets() -> tuple[Pipeline, ...]:
    return layout(6), layout(2)


class TestSglang(EngineContract):
    pass
