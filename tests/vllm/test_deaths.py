"""vLLM dies in each phase of a move, killed with 32 streams under way, and they go on token-exactly (fp32)."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.deaths import DEATHS, Mortal, mortal
from tests.vllm.test_recovery import STREAMS, Made

pytestmark = [
    pytest.mark.engine,
    pytest.mark.vllm,
    pytest.mark.real_loop,
    pytest.mark.long,
    pytest.mark.asyncio(loop_scope="module"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def dying() -> AsyncIterator[Mortal]:
    async with mortal(Made(), count=STREAMS) as dying:
        yield dying


@pytest.mark.parametrize(("name", "rank"), DEATHS)
async def test_streams_survive_a_death(dying: Mortal, name: str, rank: int | None) -> None:
    called = "vLLM's engine core" if rank is None else f"vLLM's worker of rank {rank}"
    await dying.survives(name, rank, called=called)
