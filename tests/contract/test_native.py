"""The native engine keeps the contract."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engines.native.adapter import NativeEngine
from planner.layout import Pipeline
from tests.contract.engine_contract import EngineContract
from tests.support.native import even, layout, llama, running

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[NativeEngine]:
    async with running(llama(), even(2)) as engine:
        yield engine


@pytest.fixture
def disposable_engine(engine: NativeEngine) -> NativeEngine:
    """The engine of all: the test that closes it is the last."""
    return engine


@pytest.fixture(scope="module")
def targets() -> tuple[Pipeline, ...]:
    return even(4), layout(3)


class TestNative(EngineContract):
    pass
