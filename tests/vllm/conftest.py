"""One vLLM of four pipeline ranks for many tests: it boots once."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engines.parameters.keeper import ParameterKeeper
from engines.vllm.adapter import VllmEngine
from tests.support.order import put_sharers_last
from tests.support.vllm import layout, llama, running
from topology.units import MIB

# Few KV blocks and few sequences at once: at any time some streams wait, some are in prefill, some decode, and some
# have been preempted.
KV_BLOCKS = 20
CROWDED = {
    "max_num_seqs": 6,
    "max_num_batched_tokens": 48,
    "kv_block_tokens": 32,
    "kv_cache_bytes": KV_BLOCKS * 32 * 8 * 512,  # tokens of a block, decoders, bytes of a token
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put those that share this vLLM after those that boot others, and last the one that kills it."""
    put_sharers_last(items, Path(__file__).parent, shared="engine", ends="doomed")


TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")


# Not of the session: else it would stay beside the engines of other packages.
@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def keeper() -> AsyncIterator[ParameterKeeper]:
    """Keeps layers of this vLLM in the memory of the host."""
    keeper = ParameterKeeper(64 * MIB)
    async with keeper.serving():
        yield keeper


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def engine(keeper: ParameterKeeper) -> AsyncIterator[VllmEngine]:
    kept = {"parameters": keeper.address}
    async with running(llama(), layout(2, 4, 6), ranks=4, args=TOOLS, **CROWDED, **kept) as engine:
        yield engine
