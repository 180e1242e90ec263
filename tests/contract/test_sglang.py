"""Real SGLang keeps the contract."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engines.sglang.adapter import SglangEngine
from planner.layout import Pipeline
from tests.contract.engine_contract import EngineContract
from tests.support.sglang import running
from tests.support.vllm import layout, llama

pytestmark = [
    pytest.mark.engine,
    pytest.mark.sglang,
    pytest.mark.real_loop,
    pytest.mark.asyncio(loop_scope="module"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[SglangEngine]:
    async with running(llama(), layout(4), ranks=2) as engine:
        yield engine


@pytest.fixture
def disposable_engine(engine: SglangEngine) -> SglangEngine:
    """The engine of all: a start takes a minute, and the test that closes it is the last."""
    return engine


@pytest.fixture(scope="module")
def targets() -> tuple[Pipeline, ...]:
    return layout(6), layout(2)


class TestSglang(EngineContract):
    pass
