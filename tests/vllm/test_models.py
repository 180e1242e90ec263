"""Moves with other models and other parallelism, each on a vLLM of its own."""

import asyncio

import pytest

from engines.errors import RefactoringRefused
from planner.layout import Pipeline, Stage
from tests.support import checkpoints
from tests.support.native import CACHE
from tests.support.vllm import devices, layout, llama, running
from tests.vllm.streams import assert_same, move, run_streams

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop]


def on_pairs(first: int) -> Pipeline:
    """Return a pipeline of two stages of two devices each."""
    stages = (
        Stage(device_ids=("cpu:0", "cpu:1"), first_decoder=0, end_decoder=first),
        Stage(device_ids=("cpu:2", "cpu:3"), first_decoder=first, end_decoder=8),
    )
    return Pipeline(stages=stages)


async def test_tensor_parallel_ranks_move_their_shares() -> None:
    """TP 2 x PP 2: each share goes to the rank of equal tensor-parallel index."""
    options = {"tensor_parallel": 2, "device_ids": devices(2, tensor_parallel=2)}
    async with running(llama(), on_pairs(4), ranks=2, **options) as engine:
        undisturbed = await run_streams(engine, count=4)
        streams = asyncio.create_task(run_streams(engine, count=4))
        for first in (2, 7, 8, 4):
            await move(engine, on_pairs(first))
        assert_same(await streams, undisturbed)


async def test_gpt2_moves_with_its_learnt_positions_and_tied_head() -> None:
    """Another family: other names, biases, positions that are looked up, a head tied to the embedding."""
    model = checkpoints.make_gpt2(CACHE / "gpt2-heads-of-32", hidden_size=128)
    async with running(model, layout(3, num_decoders=6), ranks=2) as engine:
        undisturbed = await run_streams(engine, count=4)
        streams = asyncio.create_task(run_streams(engine, count=4))
        for cut in (1, 5, 3):
            await move(engine, layout(cut, num_decoders=6))
        assert_same(await streams, undisturbed)


async def test_lora_is_served_and_moves_are_refused_by_its_name() -> None:
    async with running(llama(), layout(4), ranks=2, args=("--enable-lora",)) as engine:
        assert not engine.capabilities.refactors_in_place
        assert len(await run_streams(engine, count=2, max_tokens=4)) == 2
        with pytest.raises(RefactoringRefused, match="not supported with LoRA"):
            await move(engine, layout(2))
        assert (await engine.check_refactor(layout(2))).needs_replica
