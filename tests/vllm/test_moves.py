"""Layers move between the ranks of real vLLM, and nothing of any stream changes (fp32)."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import pytest
import pytest_asyncio

from engines.errors import RefactoringAborted, RefactoringBusy, RefactoringRefused
from engines.parameters.keeper import ParameterKeeper
from engines.vllm.adapter import VllmEngine
from planner.handover import HandoverPhase
from planner.layout import Pipeline
from tests.contract.contract_requests import assert_idle
from tests.support.vllm import layout
from tests.vllm.conftest import CROWDED, KV_BLOCKS
from tests.vllm.streams import (
    FAILURES_BEFORE_COMMIT,
    MOVES,
    START,
    Result,
    assert_same,
    check_found_again,
    check_killed_helper_is_replaced,
    collect,
    move,
    on_ranks,
    one_decoder_further,
    run_streams,
    stream,
    until_under_way,
)

pytestmark = [
    pytest.mark.engine,
    pytest.mark.vllm,
    pytest.mark.real_loop,
    pytest.mark.asyncio(loop_scope="session"),
]
LONGEST_SLICE_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Streams without a move, and what became of them meanwhile."""

    undisturbed: Result
    most_waiting: int
    preemptions: int


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def crowd(engine: VllmEngine) -> Crowd:
    before = await engine.counters()
    streams = asyncio.create_task(run_streams(engine))
    most_waiting = 0
    while not streams.done():
        most_waiting = max(most_waiting, (await engine.counters()).waiting)
        await asyncio.sleep(0.02)
    preemptions = (await engine.counters()).preemptions_total - before.preemptions_total
    return Crowd(undisturbed=await streams, most_waiting=most_waiting, preemptions=preemptions)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def few(engine: VllmEngine) -> Result:
    """Return what a few short streams give without a move."""
    return await run_streams(engine, count=3, max_tokens=40)


async def check_moves(engine: VllmEngine, count: int, undisturbed: Result, *, laps: Sequence[Pipeline] = MOVES) -> None:
    """Move again and again under streams that are renewed until all moves are done. ``laps`` end where they begin."""
    await move(engine, laps[0])
    moved = 0
    targets = islice(cycle(laps[1:]), count)
    ended = False
    while not ended:
        streams = asyncio.create_task(run_streams(engine))
        while not streams.done() and not ended:
            target = next(targets, None)
            ended = target is None
            if target is not None:
                reports = await move(engine, target)
                assert [r.phase for r in reports][-1] is HandoverPhase.DONE
                moved += 1
        assert_same(await streams, undisturbed)
    assert moved == count
    await assert_idle(engine)


async def test_streams_wait_and_are_preempted(crowd: Crowd) -> None:
    """The crowd is one: else the tests below would not cover those states."""
    assert crowd.most_waiting > 0
    assert crowd.preemptions > 0


async def test_ten_moves_change_nothing(engine: VllmEngine, crowd: Crowd) -> None:
    before = await engine.counters()
    await check_moves(engine, 10, crowd.undisturbed)
    after = await engine.counters()
    assert after.refactorings_total == before.refactorings_total + 10


@pytest.mark.long
async def test_forty_moves_change_nothing(engine: VllmEngine, crowd: Crowd) -> None:
    await check_moves(engine, 40, crowd.undisturbed)


async def test_the_context_is_what_a_small_kv_cache_holds(engine: VllmEngine) -> None:
    """Not the model's 2048 tokens, which would never be scheduled."""
    assert 0 < engine.capabilities.max_model_len <= KV_BLOCKS * CROWDED["kv_block_tokens"]


async def test_one_stream_alone_is_bit_identical(engine: VllmEngine) -> None:
    await move(engine, START)
    wanted = stream(1, max_tokens=100, salt=1)
    expected = await collect(engine, wanted)
    running = asyncio.create_task(collect(engine, wanted))
    for target in MOVES[1:5]:
        await move(engine, target)
    tokens, logprobs = await running
    assert tokens == expected[0]
    # The second run finds its prompt in the prefix cache, which computes the first token in another shape.
    assert logprobs[1:] == expected[1][1:] or max(abs(a - b) for a, b in zip(logprobs, expected[1], strict=True)) < 1e-4


async def test_the_prefix_cache_is_right_after_moves(engine: VllmEngine) -> None:
    await move(engine, START)
    wanted = stream(4, max_tokens=20, salt=3)
    expected = await collect(engine, wanted)
    for target in (on_ranks(4, 0, 0, 4), on_ranks(1, 5, 1, 1)):
        await move(engine, target)
        before = await engine.counters()
        assert (await collect(engine, wanted))[0] == expected[0]
        assert (await engine.counters()).prompt_tokens_total > before.prompt_tokens_total


async def test_requests_come_and_go_during_every_phase(engine: VllmEngine) -> None:
    await move(engine, START)
    undisturbed = [(await collect(engine, stream(i, max_tokens=30, salt=4)))[0] for i in range(4)]
    ended = asyncio.Event()

    async def come_and_go(index: int) -> int:
        runs = 0
        while not ended.is_set():
            if runs % 3 == 2:  # hang up in the middle
                async for _ in engine.generate(stream(index, max_tokens=200, salt=5)):
                    break
            else:
                assert (await collect(engine, stream(index, max_tokens=30, salt=4)))[0] == undisturbed[index]
            runs += 1
        return runs

    guests = [asyncio.create_task(come_and_go(index)) for index in range(4)]
    for target in MOVES[1:6]:
        await move(engine, target)
    ended.set()
    assert sum(await asyncio.gather(*guests)) > len(guests)
    await assert_idle(engine)


async def test_memory_is_given_back(engine: VllmEngine) -> None:
    await move(engine, on_ranks(1, 5, 1, 1))
    full = (await engine.stages())[1]
    await move(engine, on_ranks(3, 1, 2, 2))
    left = (await engine.stages())[1]
    assert left.weights_bytes < full.weights_bytes / 4
    assert left.kv_mapped_bytes == full.kv_mapped_bytes / 5


async def test_streams_and_moves_survive_the_death_of_the_process_that_loads_layers(engine: VllmEngine) -> None:
    await move(engine, START)
    await check_killed_helper_is_replaced(engine, 0, on_ranks(3, 1, 2, 2))


async def test_layers_that_were_loaded_before_come_from_the_memory_of_the_host(
    engine: VllmEngine, keeper: ParameterKeeper
) -> None:
    there, back = on_ranks(1, 3, 2, 2), on_ranks(3, 1, 2, 2)
    await check_found_again(engine, keeper, there, back, gained=2)


@pytest.mark.long  # a figure of time: what other tenants of a machine take of its cores counts in it
async def test_layers_are_adopted_in_short_slices(engine: VllmEngine) -> None:
    await move(engine, on_ranks(1, 5, 1, 1))
    await move(engine, on_ranks(3, 1, 2, 2))
    longest = [(await engine.rank_status(rank))["longest_slice_s"] for rank in range(4)]
    assert all(0 < slice_s < LONGEST_SLICE_S for slice_s in longest[:2]), longest


@pytest.mark.parametrize(("name", "rank"), FAILURES_BEFORE_COMMIT)
async def test_a_failure_before_the_commit_rolls_back(
    engine: VllmEngine, few: Result, name: str, rank: int | None
) -> None:
    """In either direction, in turns: the move that works is what the next test goes back by."""
    source, target, rank = one_decoder_further(engine.pipeline, rank)
    await move(engine, source)
    await engine.arm_failpoint(name, "fail", rank=rank)
    streams = asyncio.create_task(run_streams(engine, count=3, max_tokens=40))
    await until_under_way(engine)
    epoch = engine.epoch
    with pytest.raises(RefactoringAborted, match=name):
        await move(engine, target)
    assert (engine.pipeline, engine.epoch) == (source, epoch)
    assert_same(await streams, few)
    await move(engine, target)  # and the next one works


async def test_without_the_kv_copy_the_checksums_refuse_the_commit(engine: VllmEngine) -> None:
    await move(engine, START)
    for rank in range(4):
        await engine.arm_failpoint("worker.copy_out", "skip", rank=rank)
        await engine.arm_failpoint("worker.commit_copy", "skip", rank=rank)
    streams = asyncio.create_task(run_streams(engine, count=3, max_tokens=40))
    await until_under_way(engine)
    with pytest.raises(RefactoringAborted, match=r"KV blocks of layer \d differ"):
        await move(engine, on_ranks(1, 3, 2, 2))
    for rank in range(4):
        await engine.arm_failpoint("", "", rank=rank)
    await streams
    await move(engine, on_ranks(1, 3, 2, 2))


async def test_without_the_kv_copy_the_output_differs(engine: VllmEngine) -> None:
    """The control: if this passed with the copy left out, the tests above would show nothing."""
    await move(engine, START)
    undisturbed = await run_streams(engine, count=3, max_tokens=60, salt=6)
    for rank in range(4):
        await engine.arm_failpoint("worker.copy_out", "skip", rank=rank)
        await engine.arm_failpoint("worker.commit_copy", "skip", rank=rank)
    await engine.arm_failpoint("core.verify", "skip")
    streams = asyncio.create_task(run_streams(engine, count=3, max_tokens=60, salt=6))
    await until_under_way(engine)
    await move(engine, on_ranks(1, 3, 2, 2))
    await engine.arm_failpoint("", "")
    for rank in range(4):
        await engine.arm_failpoint("", "", rank=rank)
    assert [tokens for tokens, _ in await streams] != [tokens for tokens, _ in undisturbed]


async def test_a_cancelled_move_is_as_if_it_had_not_been(engine: VllmEngine) -> None:
    await move(engine, START)
    moving = engine.refactor(on_ranks(5, 1, 1, 1))
    await anext(moving)
    assert await engine.cancel_refactor()
    with pytest.raises(RefactoringAborted, match="cancelled"):
        async for _ in moving:
            pass
    assert engine.pipeline == START
    assert not await engine.cancel_refactor()


async def test_a_second_move_is_answered_busy(engine: VllmEngine) -> None:
    await move(engine, START)
    moving = engine.refactor(on_ranks(5, 1, 1, 1))
    await anext(moving)
    with pytest.raises(RefactoringBusy, match="under way"):
        await move(engine, on_ranks(1, 3, 2, 2))
    async for _ in moving:
        pass


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (layout(4), "the head stays on rank 3"),
        (layout(4, ranks=(1, 3)), "the embedding stays on rank 0"),
        (layout(2, 4, ranks=(0, 2, 3), num_decoders=9), "9"),
        (layout(0, ranks=(0, 3)), "rank 0 must hold at least one decoder"),
        (layout(2, 4, 6, ranks=(0, 2, 1, 3)), "order"),
        (layout(4, ranks=(0, 7)), "no rank on cpu:7"),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_moves(engine: VllmEngine, target: object, reason: str) -> None:
    before = engine.pipeline, engine.epoch
    with pytest.raises(RefactoringRefused, match=reason):
        await move(engine, target)  # type: ignore[arg-type]
    assert (engine.pipeline, engine.epoch) == before
