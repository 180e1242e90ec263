"""SGLang dies in each phase of a move, killed with streams under way, and they go on token-exactly (fp32)."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.sglang.recovering import Made
from tests.support.deaths import DEATHS, Mortal, mortal
from tests.vllm.streams import STREAMS

pytestmark = [
    pytest.mark.engine,
    pytest.mark.sglang,
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
    await dying.survives(name, rank, called=f"SGLang's scheduler of rank {rank or 0}")
