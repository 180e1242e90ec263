"""Forty moves between the two ranks of a vLLM of its own change nothing (fp32)."""

import pytest

from tests.support.vllm import llama, running
from tests.vllm.conftest import CROWDED
from tests.vllm.streams import on_ranks, run_streams
from tests.vllm.test_moves import check_moves

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop, pytest.mark.long]
LAPS = [on_ranks(*counts) for counts in ((4, 4), (7, 1), (8, 0), (1, 7), (8, 0), (3, 5), (4, 4))]


async def test_forty_moves_between_two_ranks_change_nothing() -> None:
    async with running(llama(), LAPS[0], ranks=2, **CROWDED) as engine:
        await check_moves(engine, 40, await run_streams(engine), laps=LAPS)
