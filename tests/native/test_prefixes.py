"""The prefix cache of the native engine: what is found is what would be computed, whatever happened in between."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio

from engines.errors import RefactoringAborted
from engines.native.adapter import NativeEngine
from engines.protocol import GenerationRequest
from tests.support.family_checkpoints import MAX_MODEL_LEN, NUM_DECODERS, make_family
from tests.support.native import collect, even, llama, move, moved_under, request, running
from tests.support.until import until

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]

SYSTEM = tuple(5 + i * 11 % 500 for i in range(70))  # four full KV blocks of 16 and some more
FOUND = 64


def question(number: int) -> GenerationRequest:
    """Return a request that begins as all of them do; greedy, or drawn by a seed."""
    own = tuple(7 + (number * 13 + i) % 400 for i in range(9))
    return request((*SYSTEM, *own), max_tokens=24, temperature=0.9 * (number % 2), seed=number)


QUESTIONS = [question(number) for number in range(4)]


async def told(engine: NativeEngine, wanted: GenerationRequest) -> tuple[list[int], int | None]:
    """Return the tokens of a request, and how many of its prompt were found."""
    tokens: list[int] = []
    found: list[int] = []
    async for chunk in engine.generate(wanted):
        tokens += chunk.token_ids
        found += [] if chunk.cached_tokens is None else [chunk.cached_tokens]
    assert len(found) <= 1
    return tokens, found[0] if found else None


async def all_told(engine: NativeEngine) -> tuple[list[list[int]], list[int | None]]:
    answers = await asyncio.gather(*(told(engine, each) for each in QUESTIONS))
    return [tokens for tokens, _ in answers], [found for _, found in answers]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[NativeEngine]:
    async with running(llama(), even(2)) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected() -> list[list[int]]:
    """Return what an engine without a prefix cache says."""
    async with running(llama(), even(2), prefix_caching=False) as engine:
        tokens, found = await all_told(engine)
        assert found == [None] * len(QUESTIONS)
        assert (await engine.counters()).prefix_queried_tokens_total is None
        return tokens


async def test_what_is_found_changes_no_token_and_is_counted(
    engine: NativeEngine, expected: Sequence[list[int]]
) -> None:
    first, found = await told(engine, QUESTIONS[0])
    assert (first, found) == (expected[0], 0)
    before = await engine.counters()
    assert await all_told(engine) == (expected, [FOUND] * len(QUESTIONS))
    after = await engine.counters()
    assert before.prefix_queried_tokens_total is not None
    assert before.prefix_hit_tokens_total is not None
    assert after.prefix_queried_tokens_total == before.prefix_queried_tokens_total + 79 * len(QUESTIONS)
    assert after.prefix_hit_tokens_total == before.prefix_hit_tokens_total + FOUND * len(QUESTIONS)
    assert (after.kv_blocks_used, after.kv_blocks_cached) > (0, FOUND // 16)


async def test_it_goes_along_with_the_layers(engine: NativeEngine, expected: Sequence[list[int]]) -> None:
    """Nothing runs when the layers move; the commit compares what is kept on both sides."""
    await all_told(engine)
    rng = random.Random(5)
    for _ in range(6):
        await move(engine, even(rng.choice([n for n in (1, 2, 4, 8) if n != engine.pipeline.granularity])))
        assert await all_told(engine) == (expected, [FOUND] * len(QUESTIONS))


async def test_requests_that_find_it_while_the_layers_move_say_the_same(
    engine: NativeEngine, expected: Sequence[list[int]]
) -> None:
    targets = [even(stages) for stages in (8, 1, 4, 2, 8, 2)]
    for told_meanwhile, _ in await moved_under(engine, targets, lambda: all_told(engine)):
        assert told_meanwhile == expected


async def test_without_the_copy_of_what_is_kept_the_commit_is_refused(engine: NativeEngine) -> None:
    await all_told(engine)
    assert (await engine.counters()).running == 0
    await move_to(engine, 2)
    for worker in range(8):
        engine.arm_failpoint("worker.copy_out", "skip", worker=worker)
    with pytest.raises(RefactoringAborted, match="KV blocks differ"):
        await move(engine, even(8))
    engine.arm_failpoint("", "")
    assert (await all_told(engine))[1] == [FOUND] * len(QUESTIONS)  # rolled back: it is still here


async def move_to(engine: NativeEngine, stages: int) -> None:
    if engine.pipeline != even(stages):
        await move(engine, even(stages))


async def test_after_the_loss_of_a_stage_nothing_is_found(engine: NativeEngine, expected: Sequence[list[int]]) -> None:
    await all_told(engine)
    restarts = (await engine.counters()).worker_restarts_total
    os.kill((await engine.stages())[0].pids[0], signal.SIGKILL)

    async def is_recovered() -> bool:
        return (await engine.counters()).worker_restarts_total > restarts

    await until(is_recovered, timeout_s=60.0)
    assert (await engine.counters()).kv_blocks_cached == 0
    assert await told(engine, QUESTIONS[0]) == (expected[0], 0)
    assert (await all_told(engine))[0] == expected


async def test_a_smaller_kv_cache_forgets_and_a_larger_one_learns_again(
    engine: NativeEngine, expected: Sequence[list[int]]
) -> None:
    bounds = engine.capabilities.kv_range
    assert bounds is not None
    for _ in range(3):
        streams = asyncio.create_task(all_told(engine))
        await engine.resize_kv(bounds.least_blocks)
        await engine.resize_kv(bounds.most_blocks)
        assert (await streams)[0] == expected
        assert (await all_told(engine))[0] == expected


async def test_prompts_whose_tokens_are_scored_have_all_scores(engine: NativeEngine) -> None:
    """They find nothing, and others find what they left."""
    wanted = request((9, *SYSTEM), max_tokens=4, prompt_logprobs=2)
    scores = []
    for _ in range(2):
        async for chunk in engine.generate(wanted):
            scores += [chunk.prompt_logprobs] if chunk.prompt_logprobs else []
    assert [each.token_id for each in scores[0]] == list(SYSTEM)
    assert [(each.token_id, each.rank) for each in scores[0]] == [(each.token_id, each.rank) for each in scores[1]]
    assert (await told(engine, request((9, *SYSTEM, 3), max_tokens=4)))[1] == FOUND


@pytest.mark.long
async def test_a_window_that_slides_sees_what_was_found() -> None:
    """Windows of Mistral's kind end within what is found, and begin there."""
    directory = make_family("mistral")
    wanted = [request((*SYSTEM[:50], number), max_tokens=20) for number in (3, 4)]
    options = {"max_model_len": MAX_MODEL_LEN, "kv_block_tokens": 4}
    async with running(directory, even(2, NUM_DECODERS), prefix_caching=False, **options) as without:
        expected = [(await collect(without, each))[0] for each in wanted]
    async with running(directory, even(2, NUM_DECODERS), **options) as engine:
        assert await told(engine, wanted[0]) == (expected[0], 0)
        assert await told(engine, wanted[1]) == (expected[1], 48)
        await move(engine, even(1, NUM_DECODERS))
        assert await told(engine, wanted[1]) == (expected[1], 48)
