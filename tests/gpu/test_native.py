"""The native engine on a GPU, several workers on one. Written without one at hand: none of it has run yet.

``pytest -m gpu tests/gpu/test_native.py`` in an environment whose torch is built for CUDA.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engines.native.adapter import NativeEngine
from tests.support.generated import generated_by_transformers
from tests.support.gpus import gpus
from tests.support.native import DEVICES, collect, even, gpt2, llama, move, request, running
from topology.gpu_memory import held_memory

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.real_loop,
    pytest.mark.asyncio(loop_scope="module"),
]

PROMPT = tuple(range(20, 57))
NEW_TOKENS = 48
Result = list[tuple[list[int], list[float]]]


def gpu() -> str:
    """Return a GPU that takes work, or skip."""
    found = gpus()
    if not found:
        pytest.skip("a CUDA device is needed, there is none")
    return found[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[NativeEngine]:
    async with running(llama(), even(2), visible=(gpu(),) * len(DEVICES), kv_cache_bytes=1 << 30) as engine:
        yield engine


@pytest.mark.parametrize(("directory", "decoders"), [(llama, 8), (gpt2, 6)], ids=["llama", "gpt2"])
async def test_tokens_are_those_of_transformers_at_1_2_and_the_most_stages(directory, decoders) -> None:  # type: ignore[no-untyped-def]
    expected = generated_by_transformers(directory(), PROMPT, NEW_TOKENS)
    visible = (gpu(),) * len(DEVICES)
    async with running(directory(), even(1, decoders), visible=visible) as engine:
        for stages in (1, 2, decoders):
            if engine.pipeline != even(stages, decoders):
                await move(engine, even(stages, decoders))
            assert (await collect(engine, request(PROMPT, max_tokens=NEW_TOKENS)))[0] == expected


async def streams(engine: NativeEngine, *, max_tokens: int) -> Result:
    prompts = [tuple(5 + (index * 37 + i * 11) % 500 for i in range(20)) for index in range(8)]
    return list(await asyncio.gather(*(collect(engine, request(each, max_tokens=max_tokens)) for each in prompts)))


async def test_streams_are_exact_over_moves(engine: NativeEngine) -> None:
    """Commit compares the KV blocks of source and destination."""
    expected = [ids for ids, _ in await streams(engine, max_tokens=200)]
    under_way = asyncio.create_task(streams(engine, max_tokens=200))
    for stages in (4, 1, 8, 2):
        assert (await move(engine, even(stages))).epoch is not None
    assert [ids for ids, _ in await under_way] == expected


def held_bytes(engine: NativeEngine) -> int:
    """Return what the driver keeps for the engine's workers."""
    return sum(each.used_bytes or 0 for each in held_memory(engine.worker_pids))


async def test_fewer_kv_blocks_give_memory_of_the_gpu_back(engine: NativeEngine) -> None:
    bounds = engine.capabilities.kv_range
    assert bounds is not None
    before = held_bytes(engine)
    returned = await engine.resize_kv(bounds.least_blocks)
    assert before - held_bytes(engine) > 0.8 * returned  # a driver rounds
    await engine.resize_kv(bounds.most_blocks)


async def test_a_lost_worker_is_recovered(engine: NativeEngine) -> None:
    expected = [ids for ids, _ in await streams(engine, max_tokens=100)]
    under_way = asyncio.create_task(streams(engine, max_tokens=100))
    await asyncio.sleep(0.2)
    os.kill(engine.worker_pids[0], signal.SIGKILL)
    assert [ids for ids, _ in await under_way] == expected
