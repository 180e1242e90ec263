"""KV caches go from one vLLM of tensor-parallel ranks to another: each share to the rank with its part of the heads."""

from contextlib import AsyncExitStack

import pytest

from engines.vllm.adapter import VllmEngine
from flexpiped.kv_carrier import copy_refusal
from planner.layout import Pipeline, Stage
from tests.support.vllm import devices, layout, roomy_llama, running
from tests.vllm.copied import assert_copy_is_exact_and_needed
from tests.vllm.streams import move, on_pairs

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop, pytest.mark.long]

ONE_PAIR = Pipeline(stages=(Stage(device_ids=("cpu:0", "cpu:1"), first_decoder=0, end_decoder=8),))
IN_PAIRS = {"tensor_parallel": 2, "kv_cache_bytes": 128 << 20}


async def test_shares_go_to_another_number_of_pipeline_ranks_and_not_to_another_degree() -> None:
    """TP 2 x PP 2 to TP 2 x PP 1; then, with layers moved since, back again. TP 1 is refused by what differs."""
    async with AsyncExitStack() as stack:

        async def boot(pipeline: Pipeline, *, ranks: int, **options: object) -> VllmEngine:
            return await stack.enter_async_context(running(roomy_llama(), pipeline, ranks=ranks, **options))  # type: ignore[arg-type]

        two = await boot(on_pairs(4), ranks=2, device_ids=devices(2, tensor_parallel=2), **IN_PAIRS)
        one = await boot(ONE_PAIR, ranks=1, device_ids=devices(1, tensor_parallel=2), **IN_PAIRS)
        assert copy_refusal(two.capabilities, one.capabilities) == ""
        await assert_copy_is_exact_and_needed(two, one)
        await move(two, on_pairs(7))
        await assert_copy_is_exact_and_needed(one, two)
        await one.close()

        alone = await boot(layout(), ranks=1, kv_cache_bytes=128 << 20)
        assert "2 shares" in copy_refusal(two.capabilities, alone.capabilities)
