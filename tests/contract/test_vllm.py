"""Real vLLM keeps the contract, with GPT-2: of another family than the model that most tests run."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engines.vllm.adapter import VllmEngine
from planner.layout import Pipeline
from tests.contract.engine_contract import EngineContract
from tests.support import checkpoints
from tests.support.native import CACHE
from tests.support.vllm import layout, running
from tests.vllm.streams import assert_same, move, run_streams

pytestmark = [
    pytest.mark.engine,
    pytest.mark.vllm,
    pytest.mark.real_loop,
    pytest.mark.asyncio(loop_scope="module"),
]


DECODERS = 6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[VllmEngine]:
    model = checkpoints.make_gpt2(CACHE / "gpt2-heads-of-32", hidden_size=128)
    async with running(model, layout(3, num_decoders=DECODERS), ranks=2) as engine:
        yield engine


@pytest.fixture
def disposable_engine(engine: VllmEngine) -> VllmEngine:
    """The engine of all: a start takes a minute, and the test that closes it is the last."""
    return engine


@pytest.fixture(scope="module")
def targets() -> tuple[Pipeline, ...]:
    return layout(5, num_decoders=DECODERS), layout(2, num_decoders=DECODERS)


async def test_learnt_positions_and_a_tied_head_move(engine: VllmEngine) -> None:
    """What else GPT-2 has: other names, biases, positions that are looked up, a head tied to the embedding."""
    undisturbed = await run_streams(engine, count=4)
    streams = asyncio.create_task(run_streams(engine, count=4))
    for cut in (1, 5, 3):
        await move(engine, layout(cut, num_decoders=DECODERS))
    assert_same(await streams, undisturbed)


class TestVllm(EngineContract):
    pass
