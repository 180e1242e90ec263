"""Refactorings change nothing: token ids identical, log-probabilities within the noise of batching."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.errors import RefactoringAborted
from engines.native.adapter import NativeEngine
from planner.layout import Pipeline, pipeline_of
from tests.support.native import DEVICES, collect, even, llama, move, moved_under, request, running

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]

STREAMS = 14
LOGPROB_BOUND = 1e-3
# Room for 6 sequences and few KV blocks, and 24 tokens a step: so at any time some streams wait, some are in prefill,
# some decode, and some have been preempted.
CROWDED = {"max_num_seqs": 6, "max_num_batched_tokens": 24, "kv_cache_bytes": 26 * 16 * 8 * 2 * 2 * 16 * 4}

Result = list[tuple[list[int], list[float]]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[NativeEngine]:
    async with running(llama(), even(2), **CROWDED) as engine:
        yield engine


class Streams(Result):
    """Hypothesis writes down the arguments of a test, and warns where they are long."""

    def __repr__(self) -> str:
        return f"<{len(self)} streams>"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(engine: NativeEngine) -> Result:
    return Streams(await run_streams(engine))


def stream(index: int):  # type: ignore[no-untyped-def]
    """Greedy and seeded streams of different lengths; with top_k and top_p among them."""
    prompt = tuple(5 + (index * 37 + i * 11) % 500 for i in range(8 + 9 * (index % 5)))
    sampling = [{}, {"temperature": 0.9}, {"temperature": 1.0, "top_k": 40}, {"temperature": 0.8, "top_p": 0.9}]
    return request(prompt, max_tokens=50 + 3 * index, seed=1000 + index, **sampling[index % 4])  # type: ignore[arg-type]


async def run_streams(engine: NativeEngine) -> Result:
    return list(await asyncio.gather(*(collect(engine, stream(i)) for i in range(STREAMS))))


def largest_difference(left: Result, right: Result) -> float:
    pairs = [pair for one, other in zip(left, right, strict=True) for pair in zip(one[1], other[1], strict=True)]
    return max(abs(a - b) for a, b in pairs)


def assert_same(result: Result, undisturbed: Result) -> None:
    assert [tokens for tokens, _ in result] == [tokens for tokens, _ in undisturbed]
    assert largest_difference(result, undisturbed) < LOGPROB_BOUND


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Any layout: 1 to 8 stages, any cuts, any devices in any order."""
    stages = draw(st.integers(1, 8))
    cuts = sorted(draw(st.sets(st.integers(1, 7), min_size=stages - 1, max_size=stages - 1)))
    devices = draw(st.permutations(DEVICES))[:stages]
    return pipeline_of(device_ids=devices, cuts=cuts, num_decoders=8)


async def check_sequence(engine: NativeEngine, undisturbed: Result, targets: list[Pipeline]) -> None:
    for result in await moved_under(engine, targets, lambda: run_streams(engine)):
        assert_same(result, undisturbed)
    counters = await engine.counters()
    assert (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)


def examples(count: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


async def test_streams_in_every_state_are_there(engine: NativeEngine, undisturbed: Result) -> None:
    before = await engine.counters()
    streams = asyncio.create_task(run_streams(engine))
    most_waiting = 0
    while not streams.done():
        most_waiting = max(most_waiting, (await engine.counters()).waiting)
        await asyncio.sleep(0)
    assert_same(streams.result(), undisturbed)
    after = await engine.counters()
    assert most_waiting > 0
    assert after.preemptions_total > before.preemptions_total


async def test_noise_floor(engine: NativeEngine, undisturbed: Result, capsys: pytest.CaptureFixture[str]) -> None:
    """What batch composition and recompute alone do to log-probabilities: the measure for the bound above."""
    alone = [await collect(engine, stream(i)) for i in range(STREAMS)]
    with capsys.disabled():
        print(
            f"\nnoise floor of log-probabilities, alone against crowded: {largest_difference(alone, undisturbed):.1e}"
        )
    assert_same(alone, undisturbed)


@examples(6)
@given(targets=st.lists(pipelines(), min_size=1, max_size=5))
async def test_random_refactorings_change_nothing(
    engine: NativeEngine, undisturbed: Result, targets: list[Pipeline]
) -> None:
    await check_sequence(engine, undisturbed, targets)


@pytest.mark.long
@examples(80)
@given(targets=st.lists(pipelines(), min_size=1, max_size=8))
async def test_many_random_refactorings_change_nothing(
    engine: NativeEngine, undisturbed: Result, targets: list[Pipeline]
) -> None:
    await check_sequence(engine, undisturbed, targets)


async def test_one_stream_alone_is_bit_identical(engine: NativeEngine) -> None:
    await move_to(engine, even(2))
    await collect(engine, stream(1))  # from here on its prompt is found: equal steps compute what is left of it
    expected = await collect(engine, stream(1))
    targets = [even(stages) for stages in (4, 1, 8, 2)]
    for found in await moved_under(engine, targets, lambda: collect(engine, stream(1))):
        assert found == expected


async def move_to(engine: NativeEngine, target: Pipeline) -> None:
    if engine.pipeline != target:
        await move(engine, target)


def lasting(index: int):  # type: ignore[no-untyped-def]
    """A stream that is still there when a move commits, however fast the engine is."""
    return request(tuple(5 + (index * 37 + i * 11) % 500 for i in range(12)), max_tokens=900, seed=index)


async def test_without_the_kv_copy_the_output_differs() -> None:
    """The control: if this passed with the copy left out, the tests above would show nothing."""
    async with running(llama(), even(2), verify_checksums=False) as engine:
        expected = list(await asyncio.gather(*(collect(engine, lasting(i)) for i in range(8))))
        for worker in range(8):
            engine.arm_failpoint("worker.copy_out", "skip", worker=worker)
        streams = asyncio.gather(*(collect(engine, lasting(i)) for i in range(8)))
        await move(engine, even(4))
        assert not streams.done()  # else there was nothing to copy
        await move(engine, even(8))
        assert [tokens for tokens, _ in await streams] != [tokens for tokens, _ in expected]


async def test_without_the_kv_copy_the_checksums_refuse_the_commit(engine: NativeEngine) -> None:
    await move_to(engine, even(2))
    for worker in range(8):
        engine.arm_failpoint("worker.copy_out", "skip", worker=worker)
    streams = asyncio.gather(*(collect(engine, stream(i)) for i in range(8)))
    with pytest.raises(RefactoringAborted, match="KV blocks differ"):
        await move(engine, even(4))
    engine.arm_failpoint("", "")
    await streams


async def refactor_in_a_row(count: int, num_streams: int) -> None:
    """Lose nothing and leak nothing: every stream whole and exact, no KV block, row or descriptor left behind."""
    rng = random.Random(7)
    async with running(llama(), even(2), max_num_seqs=32) as engine:
        expected = [await collect(engine, long_stream(i)) for i in range(num_streams)]
        descriptors = None
        results: list[tuple[int, tuple[list[int], list[float]]]] = []
        stop = asyncio.Event()

        async def keep_streaming(index: int) -> None:
            while not stop.is_set():
                results.append((index, await collect(engine, long_stream(index))))

        streams = [asyncio.create_task(keep_streaming(i)) for i in range(num_streams)]
        for number in range(count):
            stages = rng.choice([s for s in range(1, 9) if s != engine.pipeline.granularity])
            report = await move(engine, even(stages))
            assert report.epoch == number + 1
            if number == min(5, count // 2):
                descriptors = open_descriptors(engine)
        stop.set()
        await asyncio.gather(*streams)
        assert len(results) >= num_streams
        assert all(tokens == expected[index][0] for index, (tokens, _) in results)
        assert open_descriptors(engine) == descriptors
        counters = await engine.counters()
        assert (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)
        assert counters.refactorings_total == count
        assert counters.worker_restarts_total == 0


def long_stream(index: int):  # type: ignore[no-untyped-def]
    prompt = tuple(5 + (index * 31 + i * 7) % 500 for i in range(12))
    return request(prompt, max_tokens=120, temperature=0.8 * (index % 2), seed=index)


def open_descriptors(engine: NativeEngine) -> int:
    import os

    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (engine.core_pid, *engine.worker_pids))  # noqa: PTH208


async def test_refactorings_in_a_row_lose_and_leak_nothing() -> None:
    await refactor_in_a_row(10, 16)


@pytest.mark.long
async def test_50_refactorings_in_a_row_under_32_streams_lose_and_leak_nothing() -> None:
    await refactor_in_a_row(50, 32)
