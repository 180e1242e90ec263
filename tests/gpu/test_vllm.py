"""Layers move between the ranks of real vLLM on GPUs. Written without one at hand: none of it has run yet.

Needs two CUDA devices and ``FLEXPIPED_VLLM_PYTHON`` with a vLLM for CUDA: ``pytest -m gpu tests/gpu``.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from engines.vllm.adapter import VllmEngine
from planner.handover import HandoverPhase
from planner.layout import Pipeline, pipeline_of
from tests.support.gpus import gpus
from tests.support.vllm import DECODERS, graph_of, llama, options_for
from tests.vllm.copied import assert_copy_is_exact_and_needed
from tests.vllm.streams import assert_same, move, run_streams
from topology.gpu_memory import held_memory

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.gpu, pytest.mark.real_loop]

RANKS = 2
KV_CACHE_BYTES = 1 << 30  # large against CUDA's context, so that what is given back shows
CUTS = (4, 6, 1, 7, 4)


@pytest.fixture
def uuids() -> tuple[str, ...]:
    """Return two GPUs that take work, or skip."""
    found = gpus()
    if len(found) < RANKS:
        pytest.skip(f"{RANKS} CUDA devices are needed, there are {len(found)}")
    return found[:RANKS]


@asynccontextmanager
async def on_gpus(uuids: Sequence[str], **overrides: object) -> AsyncIterator[VllmEngine]:
    """Start vLLM with one rank on each GPU, float32 for exactness."""
    values: dict[str, object] = {
        "device_ids": tuple(uuids),
        "device_memory_bytes": 0,
        "cuda": True,
        "kv_cache_bytes": KV_CACHE_BYTES,
        "kv_block_tokens": 16,
    }
    options = options_for(llama(), ranks=len(uuids), **values | overrides)
    engine = VllmEngine(options, cut(uuids, *CUTS[: len(uuids) - 1]), graph=graph_of(llama()))
    await engine.start(on_progress=lambda _message: None)
    try:
        yield engine
    finally:
        await engine.close()


def cut(uuids: Sequence[str], *cuts: int) -> Pipeline:
    return pipeline_of(device_ids=uuids, cuts=cuts, num_decoders=DECODERS)


def memory_of_rank(engine: VllmEngine, rank: int) -> int:
    """Return what the driver keeps for one rank's process."""
    return sum(each.used_bytes or 0 for each in held_memory([engine.pids["workers"][rank]]))


async def test_moves_change_nothing(uuids: tuple[str, ...]) -> None:
    """KV blocks are compared at each commit, too."""
    async with on_gpus(uuids) as engine:
        undisturbed = await run_streams(engine)
        for place in CUTS[1:]:
            reports = await move(engine, cut(uuids, place))
            assert reports[-1].phase is HandoverPhase.DONE
            assert_same(await run_streams(engine), undisturbed)


async def test_a_rank_gives_memory_back_as_the_driver_sees_it(uuids: tuple[str, ...]) -> None:
    async with on_gpus(uuids) as engine:
        await move(engine, cut(uuids, 1))
        full = memory_of_rank(engine, 1)
        await move(engine, cut(uuids, 7))
        given_back = full - memory_of_rank(engine, 1)
        assert given_back > KV_CACHE_BYTES / DECODERS * 5  # of six layers; a driver rounds


async def test_graphs_are_captured_again_and_change_nothing(uuids: tuple[str, ...]) -> None:
    async with on_gpus(uuids, compile=True) as engine:
        undisturbed = await run_streams(engine)
        await move(engine, cut(uuids, 6))
        assert_same(await run_streams(engine), undisturbed)
        await engine.recompiled()
        assert [stage.runs for stage in await engine.stages()] == ["compiled", "compiled"]
        assert_same(await run_streams(engine), undisturbed)


async def test_a_kv_cache_is_copied_to_another_vllm(uuids: tuple[str, ...]) -> None:
    """One rank each, on a GPU of its own; and without the copy the tokens are others."""
    async with on_gpus(uuids[:1]) as first, on_gpus(uuids[1:]) as second:
        await assert_copy_is_exact_and_needed(first, second)
