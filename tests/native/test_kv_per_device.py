"""A KV budget of each device: with the layout, the number of KV blocks follows under streams, and tokens stay exact."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engines.errors import RefactoringAborted, UnsupportedByEngine
from engines.native.adapter import NativeEngine
from engines.offers import KvRange
from planner.layout import Pipeline, pipeline_of
from tests.support.native import DEVICES, collect, even, llama, move, moved_under, request, running

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]

BLOCKS = 26  # of all eight decoders on one device: too few for all streams
BLOCK_BYTES = 16 * 8 * 2 * 2 * 16 * 4  # of 16 tokens in 8 decoders, two KV heads of 16 numbers
STREAMS, MAX_MODEL_LEN = 14, 256
Result = list[tuple[list[int], list[float]]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[NativeEngine]:
    options = {"kv_device_bytes": BLOCKS * BLOCK_BYTES, "max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": 64}
    async with running(llama(), even(1), **options) as engine:
        yield engine


async def run_streams(engine: NativeEngine) -> Result:
    prompts = [tuple(5 + (index * 37 + i * 11) % 500 for i in range(8 + 9 * (index % 5))) for index in range(STREAMS)]
    wanted = [
        request(prompt, max_tokens=50 + 3 * index, seed=1000 + index, temperature=0.9 * (index % 2))
        for index, prompt in enumerate(prompts)
    ]
    return list(await asyncio.gather(*(collect(engine, each) for each in wanted)))


def tokens_of(result: Result) -> list[list[int]]:
    return [tokens for tokens, _ in result]


async def capacity(engine: NativeEngine) -> int:
    return (await engine.counters()).kv_blocks_capacity


async def assert_has(engine: NativeEngine, blocks: int) -> None:
    """So many KV blocks, and no stage has mapped more than the budget of its device."""
    assert await capacity(engine) == blocks
    assert engine.capabilities.kv_range == KvRange(least_blocks=MAX_MODEL_LEN // 16, most_blocks=blocks)
    pages = 8 * 2 * 4096  # an end of a page for each tensor
    assert all(stage.kv_mapped_bytes <= BLOCKS * BLOCK_BYTES + pages for stage in await engine.stages())


async def test_capacity_doubles_and_halves_with_the_stages_under_streams(engine: NativeEngine) -> None:
    await assert_has(engine, BLOCKS)
    undisturbed = tokens_of(await run_streams(engine))
    crowded = (await engine.counters()).preemptions_total
    assert crowded > 0  # it binds
    assert await moved(engine, [even(2)]) == undisturbed
    await assert_has(engine, 2 * BLOCKS)
    assert await moved(engine, [even(1)]) == undisturbed
    await assert_has(engine, BLOCKS)
    assert await moved(engine, [even(4), even(2), even(1)]) == undisturbed
    await assert_has(engine, BLOCKS)


async def moved(engine: NativeEngine, targets: list[Pipeline]) -> list[list[int]]:
    """Return what the streams gave while it moved from target to target: the same each time."""
    results = [tokens_of(each) for each in await moved_under(engine, targets, lambda: run_streams(engine))]
    assert all(each == results[0] for each in results)
    return results[0]


async def test_more_stages_hold_more_requests_at_once(engine: NativeEngine) -> None:
    assert await most_used(engine) <= BLOCKS
    await move(engine, even(2))
    assert BLOCKS < await most_used(engine) <= 2 * BLOCKS
    await move(engine, even(1))


async def most_used(engine: NativeEngine) -> int:
    """Return how many KV blocks were in use at once while the streams ran."""
    streams = asyncio.create_task(run_streams(engine))
    used = [0]
    while not streams.done():
        used.append((await engine.counters()).kv_blocks_used)
        await asyncio.sleep(0)
    await streams
    return max(used)


async def test_an_uneven_layout_has_what_its_fullest_device_holds(engine: NativeEngine) -> None:
    uneven = pipeline_of(device_ids=DEVICES[:2], cuts=[6], num_decoders=8)
    await move(engine, uneven)
    await assert_has(engine, BLOCKS * 8 // 6)
    swapped = pipeline_of(device_ids=(DEVICES[1], DEVICES[0]), cuts=[6], num_decoders=8)
    await move(engine, swapped)
    await assert_has(engine, BLOCKS * 8 // 6)
    await move(engine, even(1))
    await assert_has(engine, BLOCKS)


@pytest.mark.parametrize("failpoint", ["core.prepare", "core.commit.last"])
async def test_a_move_that_is_rolled_back_leaves_the_capacity_as_it_was(engine: NativeEngine, failpoint: str) -> None:
    await move(engine, even(2))
    engine.arm_failpoint(failpoint, "raise")
    with pytest.raises(RefactoringAborted):
        await move(engine, even(1))
    engine.arm_failpoint("", "")
    await assert_has(engine, 2 * BLOCKS)
    await move(engine, even(1))


async def test_what_others_memory_has_bounded_it_to_stays_over_moves(engine: NativeEngine) -> None:
    await engine.resize_kv(20)
    await move(engine, even(2))
    assert (await capacity(engine), engine.capabilities.kv_range) == (20, KvRange(least_blocks=16, most_blocks=52))
    await engine.resize_kv(52)
    await move(engine, even(1))
    await assert_has(engine, BLOCKS)
    await move(engine, even(2))
    await assert_has(engine, 2 * BLOCKS)
    await move(engine, even(1))


@pytest.mark.long
async def test_a_layout_that_could_not_hold_the_longest_request_is_refused() -> None:
    options = {"kv_device_bytes": BLOCKS * BLOCK_BYTES, "max_model_len": 512}
    async with running(llama(), even(2), **options) as engine:
        check = await engine.check_refactor(even(1))
        assert not check.feasible
        assert check.sentences == (
            "both layouts together have KV cache for 416 tokens, fewer than the longest request may have "
            "(max_model_len 512)",
        )
        assert (await engine.check_refactor(even(4))).feasible
    with pytest.raises(UnsupportedByEngine, match="more than the 416 tokens of the KV cache: raise kv_cache_per_devi"):
        async with running(llama(), even(1), **options):
            pass


@pytest.mark.long
async def test_the_longest_request_is_one_that_every_layout_can_hold() -> None:
    async with running(llama(), even(4), kv_device_bytes=BLOCKS * BLOCK_BYTES) as engine:
        assert engine.capabilities.max_model_len == 26 * 16
        assert await capacity(engine) == 4 * BLOCKS
