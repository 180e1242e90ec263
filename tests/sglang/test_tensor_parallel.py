"""Two pipeline ranks of two tensor-parallel ranks each: layers move between them, each share for itself (fp32)."""

import asyncio

import pytest

from tests.support.sglang import running
from tests.support.vllm import devices, llama
from tests.vllm.streams import assert_same, move, on_pairs, run_streams

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.long]


async def test_tensor_parallel_ranks_move_their_shares() -> None:
    """Each share goes to the rank of equal tensor-parallel index; all are compared at each commit."""
    options = {"tensor_parallel": 2, "device_ids": devices(2, tensor_parallel=2)}
    async with running(llama(), on_pairs(4), ranks=2, **options) as engine:
        undisturbed = await run_streams(engine, count=4)
        streams = asyncio.create_task(run_streams(engine, count=4))
        for first in (2, 7, 8, 4):
            await move(engine, on_pairs(first))
        assert_same(await streams, undisturbed)
