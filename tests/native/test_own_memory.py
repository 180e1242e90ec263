"""The engine as on devices with memory of their own: weights copied, KV caches allocated, hidden states brought over.

The CPU stands in for the devices. What it computes, and what moves, is what it is in the host's memory.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engines.native.adapter import NativeEngine
from engines.native.compute import STAND_IN
from engines.protocol import RefactorProgress
from tests.support.native import DEVICES, collect, even, llama, move, moved_under, request, running
from tests.support.until import until

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]

Result = list[tuple[list[int], list[float]]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[NativeEngine]:
    async with running(llama(), even(2), visible=(STAND_IN,) * len(DEVICES)) as engine:
        yield engine


async def streams(engine: NativeEngine, *, max_tokens: int) -> Result:
    """Run some that are drawn and some that are not."""
    prompts = [tuple(5 + (index * 37 + i * 11) % 500 for i in range(20)) for index in range(4)]
    wanted = [
        request(prompt, max_tokens=max_tokens, temperature=0.9 * (i % 2), seed=i) for i, prompt in enumerate(prompts)
    ]
    return list(await asyncio.gather(*(collect(engine, each) for each in wanted)))


def tokens(result: Result) -> list[list[int]]:
    return [ids for ids, _ in result]


async def test_streams_are_exact_over_moves_and_kv_memory_follows(engine: NativeEngine) -> None:
    """Commit compares the KV blocks; each decoder's cache has its whole size where it is, and none where it was."""
    expected = tokens(await streams(engine, max_tokens=120))
    targets = [even(stages) for stages in (4, 1, 8, 2)]
    for result in await moved_under(engine, targets, lambda: streams(engine, max_tokens=120), check=has_moved):
        assert tokens(result) == expected
    first, second = await engine.stages()
    block_bytes = 16 * 2 * 2 * 16 * 4  # of one decoder: 16 tokens, keys and values of 2 heads of 16
    assert first.kv_mapped_bytes == second.kv_mapped_bytes == (8 << 20) + 4 * block_bytes  # block 0 comes on top


def has_moved(last: RefactorProgress) -> None:
    assert last.epoch is not None
    assert last.returned_bytes > 0


async def test_the_kv_cache_shrinks_and_grows_under_streams(engine: NativeEngine) -> None:
    bounds = engine.capabilities.kv_range
    assert bounds is not None
    expected = tokens(await streams(engine, max_tokens=120))
    running_streams = asyncio.create_task(streams(engine, max_tokens=120))
    await until(lambda: generating(engine), timeout_s=30.0)
    returned = await engine.resize_kv(bounds.least_blocks)
    small = [stage.kv_mapped_bytes for stage in await engine.stages()]
    await move(engine, even(4))
    assert sum(stage.kv_mapped_bytes for stage in await engine.stages()) == sum(small)
    await engine.resize_kv(bounds.most_blocks)
    assert sum(stage.kv_mapped_bytes for stage in await engine.stages()) == sum(small) + returned
    assert tokens(await running_streams) == expected


async def test_a_lost_worker_comes_back_with_the_kv_cache_of_now(engine: NativeEngine) -> None:
    if engine.pipeline != even(2):
        await move(engine, even(2))
    bounds = engine.capabilities.kv_range
    assert bounds is not None
    expected = tokens(await streams(engine, max_tokens=60))
    await engine.resize_kv(bounds.least_blocks)
    running_streams = asyncio.create_task(streams(engine, max_tokens=60))
    await until(lambda: generating(engine), timeout_s=30.0)
    os.kill(engine.worker_pids[1], signal.SIGKILL)
    assert tokens(await running_streams) == expected
    first, second = await engine.stages()
    assert first.kv_mapped_bytes == second.kv_mapped_bytes


async def generating(engine: NativeEngine) -> bool:
    return (await engine.counters()).running == 4
