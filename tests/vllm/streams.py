"""Streams whose output must not change, and how it is compared."""

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import pairwise
from typing import Any, Protocol

from engines.parameters.keeper import ParameterKeeper
from engines.protocol import Engine, EngineCounters, GenerationRequest, RefactorProgress, SamplingParams
from planner.layout import Pipeline, Stage
from tests.support.until import until
from tests.support.vllm import DECODERS, layout
from topology.units import MIB

STREAMS = 8
LOGPROB_BOUND = 1e-3
Result = list[tuple[list[int], list[float]]]


class Counted(Protocol):
    """An engine, or what stands for one, that says what it is doing."""

    async def counters(self) -> EngineCounters: ...


def stream(index: int, *, max_tokens: int = 0, salt: int = 0) -> GenerationRequest:
    """Greedy streams of different lengths; another salt gives other prompts."""
    prompt = tuple(5 + (index * 37 + i * 11 + salt * 101) % 500 for i in range(8 + 17 * (index % 5)))
    params = SamplingParams(max_tokens=max_tokens or 60 + 5 * index, ignore_eos=True, logprobs=True)
    return GenerationRequest(request_id=f"stream-{index}", prompt_token_ids=prompt, sampling=params)


async def collect(engine: Engine, wanted: GenerationRequest) -> tuple[list[int], list[float]]:
    tokens: list[int] = []
    logprobs: list[float] = []
    async for chunk in engine.generate(wanted):
        tokens += chunk.token_ids
        logprobs += chunk.logprobs
    return tokens, logprobs


async def run_streams(
    engine: Engine, *, count: int = STREAMS, max_tokens: int = 0, salt: int = 0, lengths: Sequence[int] = ()
) -> Result:
    """Run streams to their end: of ``max_tokens``, or each of its own of ``lengths``."""
    tokens = lengths or [max_tokens] * count
    wanted = [stream(index, max_tokens=tokens[index], salt=salt) for index in range(count)]
    return list(await asyncio.gather(*(collect(engine, one) for one in wanted)))


async def move(engine: Engine, target: Pipeline) -> list[RefactorProgress]:
    """Move unless it is in force already."""
    if target == engine.pipeline:
        return []
    return [progress async for progress in engine.refactor(target)]


async def until_under_way(engine: Counted) -> None:
    """Return when a request that has been sent runs."""

    async def runs() -> bool:
        return (await engine.counters()).running > 0

    await until(runs, timeout_s=60.0)


async def check_found_again(
    engine: Engine, keeper: ParameterKeeper, there: Pipeline, back: Pipeline, *, gained: int
) -> None:
    """Move there and back twice: ``gained`` layers come each time, and then all are kept. The next move finds them."""
    for target in (there, back, there, back):
        await move(engine, target)
    undisturbed = await run_streams(engine, count=2, max_tokens=20)
    before = keeper.figures
    await move(engine, there)
    after = keeper.figures
    counted = after.hits_total - before.hits_total, after.misses_total - before.misses_total
    assert counted == (gained, 0), (before, after)
    assert after.refusal == ""
    assert_same(await run_streams(engine, count=2, max_tokens=20), undisturbed)


async def check_first_layers_are_kept(
    start: Callable[[Pipeline, int, str], AbstractAsyncContextManager[Engine]],
) -> None:
    """Start on one rank, which keeps all layers; then on two, which find them there and share them with moves.

    ``start`` takes a layout, the number of ranks, and the address of a keeper.
    """
    keeper = ParameterKeeper(64 * MIB)
    async with keeper.serving():
        async with start(layout(), 1, keeper.address) as cold:
            undisturbed = await run_streams(cold, count=3, max_tokens=30)
        assert (keeper.figures.hits_total, keeper.figures.misses_total) == (0, DECODERS)
        await until(lambda: keeper.figures.idle_layers == DECODERS)
        async with start(layout(2), 2, keeper.address) as warm:
            assert (keeper.figures.hits_total, keeper.figures.misses_total) == (DECODERS, DECODERS)
            assert_same(await run_streams(warm, count=3, max_tokens=30), undisturbed)
            await move(warm, layout(5))
            assert keeper.figures.hits_total == DECODERS + 3
            await until(lambda: [each.users for each in keeper.kept.layers] == [1] * DECODERS)
            assert_same(await run_streams(warm, count=3, max_tokens=30), undisturbed)
        assert keeper.figures.refusal == ""


async def check_killed_helper_is_replaced(engine: Any, rank: int, target: Pipeline) -> None:
    """Kill the process that loads layers for a rank which gains some: streams and the move go on."""
    undisturbed = await run_streams(engine, count=2, max_tokens=40)
    streams = asyncio.create_task(run_streams(engine, count=2, max_tokens=40))
    await until_under_way(engine)
    os.kill(engine.pids["helpers"][rank], signal.SIGKILL)
    await move(engine, target)
    assert engine.pipeline == target
    assert_same(await streams, undisturbed)


def largest_difference(left: Result, right: Result) -> float:
    pairs = [pair for one, other in zip(left, right, strict=True) for pair in zip(one[1], other[1], strict=True)]
    return max(abs(a - b) for a, b in pairs)


def assert_same(result: Result, undisturbed: Result) -> None:
    assert [tokens for tokens, _ in result] == [tokens for tokens, _ in undisturbed]
    assert largest_difference(result, undisturbed) < LOGPROB_BOUND


def on_ranks(*counts: int) -> Pipeline:
    """Return the pipeline with that many decoders on each rank; an empty middle rank is left out."""
    last = len(counts) - 1
    ranks = tuple(rank for rank, decoders in enumerate(counts) if decoders or rank in (0, last))
    bounds = [0]
    for rank in ranks:
        bounds.append(bounds[-1] + counts[rank])
    return layout(*bounds[1:-1], ranks=ranks)


def on_pairs(first: int) -> Pipeline:
    """Return a pipeline of two stages of two devices each."""
    stages = (
        Stage(device_ids=("cpu:0", "cpu:1"), first_decoder=0, end_decoder=first),
        Stage(device_ids=("cpu:2", "cpu:3"), first_decoder=first, end_decoder=8),
    )
    return Pipeline(stages=stages)


# In both directions, with ranks drained and filled again, one layer at a time and many.
MOVES = [
    on_ranks(*counts)
    for counts in (
        (2, 2, 2, 2), (3, 1, 2, 2), (4, 0, 2, 2), (4, 0, 0, 4), (8, 0, 0, 0), (1, 0, 0, 7), (1, 5, 1, 1),
        (2, 3, 3, 0), (1, 1, 1, 5), (5, 1, 1, 1), (2, 2, 2, 2),
    )
]  # fmt: skip
assert all(one != other for one, other in pairwise(MOVES))

START, FURTHER = MOVES[0], on_ranks(1, 3, 2, 2)


def one_decoder_further(current: Pipeline, rank: int | None) -> tuple[Pipeline, Pipeline, int | None]:
    """Return from where to where one decoder moves, and the rank that has there the part of ``rank`` in the first case.

    That is from ``START`` to ``FURTHER``, or back again from where that has led.
    """
    if current != FURTHER:
        return START, FURTHER, rank
    return FURTHER, START, None if rank is None else 1 - rank


# Failpoints that a move from START to FURTHER passes before its commit, and the rank; None: the core.
FAILURES_BEFORE_COMMIT = [
    ("worker.prepare", 1),
    ("worker.load", 1),
    ("worker.prepared", 1),
    ("core.begin", None),
    ("core.round", None),
    ("worker.copy_out", 0),
    ("worker.copy_in", 1),
    ("core.drain", None),
    ("core.commit", None),
    ("worker.commit", 0),
    ("core.commit.last", None),
]
