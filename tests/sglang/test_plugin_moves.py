"""Layers move between the ranks of real SGLang, and nothing of any stream changes (fp32).

The plugin is driven by its sockets alone. See ``tests/vllm/test_moves.py`` for the same of vLLM.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import pytest
import pytest_asyncio

from engines.errors import RefactoringAborted
from planner.layout import Pipeline
from tests.contract.contract_requests import assert_idle
from tests.support.sglang_plugin import PluginDriver, driven
from tests.support.visitors import SLOW_POINTS, Visitors
from tests.support.vllm import llama
from tests.vllm.streams import (
    FAILURES_BEFORE_COMMIT,
    MOVES,
    START,
    Result,
    assert_same,
    collect,
    on_ranks,
    one_decoder_further,
    run_streams,
    stream,
    until_under_way,
)

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="session")]
# Short prefills and little KV cache: at any time some streams are in prefill and some decode. SGLang's own test switch
# retracts one now and then, as it does when the KV cache is full.
CROWDED = ("--max-total-tokens", "1000", "--chunked-prefill-size", "48", "--max-running-requests", "8")
MOST_MOVES = 40
RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "37"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def driver() -> AsyncIterator[PluginDriver]:
    async with driven(llama(), (2, 2, 2, 2), more=CROWDED, variables=RETRACTING) as made:
        yield made


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Streams without a move, and what became of them meanwhile."""

    undisturbed: Result
    most_running: int
    most_waiting: int
    retractions: int


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def crowd(driver: PluginDriver) -> Crowd:
    retracted = (await driver.counters()).preemptions_total
    streams = asyncio.create_task(run_streams(driver))
    most_waiting = most_running = 0
    while not streams.done():
        counters = await driver.counters()
        most_waiting, most_running = max(most_waiting, counters.waiting), max(most_running, counters.running)
        await asyncio.sleep(0.02)
    return Crowd(
        undisturbed=await streams,
        most_running=most_running,
        most_waiting=most_waiting,
        retractions=(await driver.counters()).preemptions_total - retracted,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def few(driver: PluginDriver) -> Result:
    """Return what a few short streams give without a move."""
    return await run_streams(driver, count=3, max_tokens=30)


async def move(driver: PluginDriver, target: Pipeline) -> None:
    if target != driver.pipeline:
        async for _ in driver.refactor(target):
            pass


async def check_moves(
    driver: PluginDriver, count: int, undisturbed: Result, laps: Sequence[Pipeline] = tuple(MOVES[1:])
) -> None:
    """Move again and again under streams that are renewed until all moves are done."""
    await move(driver, laps[-1])
    moved, targets, ended = 0, islice(cycle(laps), count), False
    while not ended:
        streams: asyncio.Task[Result] = asyncio.create_task(run_streams(driver))
        while not streams.done() and not ended:
            target = next(targets, None)
            ended = target is None
            if target is not None:
                await move(driver, target)
                moved += 1
        assert_same(await streams, undisturbed)
    assert moved == count
    assert driver.crashes == []
    await assert_idle(driver)


async def test_streams_wait_and_are_retracted(crowd: Crowd) -> None:
    """The crowd is one: else the tests below would not cover those states."""
    assert crowd.most_waiting > 0
    assert crowd.most_running > 2  # of one micro-batch
    assert crowd.retractions > 0


async def test_six_moves_change_nothing(driver: PluginDriver, crowd: Crowd) -> None:
    """Every commit compares the checksums of all live KV slots on both sides."""
    epoch = driver.epoch
    await check_moves(driver, 6, crowd.undisturbed)
    assert driver.epoch >= epoch + 6


@pytest.mark.long
async def test_forty_moves_change_nothing(driver: PluginDriver, crowd: Crowd) -> None:
    await check_moves(driver, 40, crowd.undisturbed)


@pytest.mark.long
async def test_forty_moves_between_two_ranks_change_nothing() -> None:
    targets = [on_ranks(*counts) for counts in ((3, 5), (6, 2), (8, 0), (1, 7), (5, 3), (4, 4))]
    async with driven(llama(), (4, 4), more=CROWDED, variables=RETRACTING) as driver:
        await check_moves(driver, 40, await run_streams(driver), targets)


@pytest.mark.long
async def test_moves_of_pages_of_several_tokens_change_nothing() -> None:
    paged = (*CROWDED, "--page-size", "16")
    async with driven(llama(), (2, 2, 2, 2), more=paged, variables=RETRACTING) as driver:
        assert driver.ready["kv_block_tokens"] == 16
        await check_moves(driver, 6, await run_streams(driver))


async def test_the_radix_cache_is_right_after_moves(driver: PluginDriver) -> None:
    await move(driver, START)
    wanted = stream(4, max_tokens=40, salt=3)
    expected = await collect(driver, wanted)
    for target in (on_ranks(4, 0, 0, 4), on_ranks(1, 5, 1, 1)):
        await move(driver, target)
        assert_same([await collect(driver, wanted)], [expected])
        assert driver.cached_tokens[wanted.request_id] > len(wanted.prompt_token_ids) // 2


async def test_requests_come_end_and_are_given_up_or_retracted_in_every_phase(driver: PluginDriver) -> None:
    """Moves go on until all of it has been seen."""
    await move(driver, START)
    visitors = Visitors(driver)
    async with visitors.visiting():
        for target in islice(cycle(MOVES[1:]), MOST_MOVES):
            await be_slow_in_each_phase(driver)
            await visitors.see(target)
            if not visitors.missing:
                break
    for rank in range(4):
        await driver.arm("", "", rank=rank)
    assert visitors.missing == []
    await assert_idle(driver)


async def be_slow_in_each_phase(driver: PluginDriver) -> None:
    for point in SLOW_POINTS.values():
        for rank in range(4):
            await driver.arm(point, "slow", rank=rank)


async def test_later_rounds_send_only_what_was_written_since(driver: PluginDriver) -> None:
    """A round that is slow has steps write meanwhile; moves go on until one of them has had to copy that in a round."""
    await move(driver, START)
    await run_streams(driver, salt=9)  # the radix cache keeps what they leave
    streams = asyncio.create_task(run_streams(driver, count=2, max_tokens=150, salt=9))
    await until_under_way(driver)
    usual, driver.limits = driver.limits, replace(driver.limits, remainder_slots=0)
    rounds: tuple[int, ...] = ()
    for target in islice(cycle(MOVES[1:]), MOST_MOVES):
        for rank in range(4):
            await driver.arm("worker.copy_in", "slow", rank=rank)
        [*_, last] = [report async for report in driver.refactor(target)]
        rounds = last.kv_round_bytes
        if len(rounds) > 1:
            break
    driver.limits = usual
    for rank in range(4):
        await driver.arm("", "", rank=rank)
    await streams
    assert 0 < rounds[1] < rounds[0] / 4


async def test_memory_is_given_back(driver: PluginDriver) -> None:
    await move(driver, on_ranks(1, 5, 1, 1))
    await run_streams(driver, salt=8)  # KV caches are mapped when they are written
    full = (await driver.status())[1]
    full_bytes = resident_shared_bytes(full["pid"])
    await move(driver, on_ranks(3, 1, 2, 2))
    left = (await driver.status())[1]
    assert left["weights_bytes"] < full["weights_bytes"] / 3  # SGLang has the head on every rank
    assert left["kv_mapped_bytes"] == full["kv_mapped_bytes"] / 5
    assert full_bytes - resident_shared_bytes(left["pid"]) > (full["weights_bytes"] - left["weights_bytes"]) / 2


def resident_shared_bytes(pid: int) -> int:
    """Return what the kernel counts of KV caches and of weights that came in a move: both are shared mappings."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["RssShmem"].split()[0]) * 1024


@pytest.mark.parametrize(("name", "rank"), FAILURES_BEFORE_COMMIT)
async def test_a_failure_before_the_commit_rolls_back(
    driver: PluginDriver, few: Result, name: str, rank: int | None
) -> None:
    """In either direction, in turns: the move that works is what the next test goes back by."""
    source, target, rank = one_decoder_further(driver.pipeline, rank)
    await move(driver, source)
    await driver.arm(name, "fail", rank=rank)
    streams = asyncio.create_task(run_streams(driver, count=3, max_tokens=30))
    await until_under_way(driver)
    epoch = driver.epoch
    with pytest.raises(RefactoringAborted, match=name):
        await move(driver, target)
    assert (driver.pipeline, driver.epoch, driver.crashes) == (source, epoch, [])
    assert_same(await streams, few)
    await move(driver, target)  # and the next one works


async def leave_the_copy_out(driver: PluginDriver, action: str) -> None:
    for rank in range(4):
        for name in ("worker.copy_out", "worker.commit_copy") if action else ("",):
            await driver.arm(name, action, rank=rank)


async def test_without_the_kv_copy_the_checksums_refuse_the_commit(driver: PluginDriver) -> None:
    await move(driver, START)
    await leave_the_copy_out(driver, "skip")
    streams = asyncio.create_task(run_streams(driver, count=3, max_tokens=40))
    await until_under_way(driver)
    with pytest.raises(RefactoringAborted, match=r"KV blocks of layer \d differ"):
        await move(driver, on_ranks(1, 3, 2, 2))
    await leave_the_copy_out(driver, "")
    await streams
    await move(driver, on_ranks(1, 3, 2, 2))


async def test_without_the_kv_copy_the_output_differs(driver: PluginDriver) -> None:
    """The control: if this passed with the copy left out, the tests above would show nothing."""
    await move(driver, START)
    undisturbed = await run_streams(driver, count=3, max_tokens=80, salt=6)
    await leave_the_copy_out(driver, "skip")
    await driver.arm("core.verify", "skip")
    streams = asyncio.create_task(run_streams(driver, count=3, max_tokens=80, salt=6))
    await until_under_way(driver)
    await move(driver, on_ranks(1, 3, 2, 2))
    await driver.arm("", "")
    await leave_the_copy_out(driver, "")
    assert [tokens for tokens, _ in await streams] != [tokens for tokens, _ in undisturbed]


async def test_a_pause_pauses_every_micro_batch(driver: PluginDriver) -> None:
    """SGLang's own pause does not under pipeline parallelism, and says that it did."""
    await move(driver, START)
    undisturbed = await run_streams(driver, count=4, max_tokens=30, salt=7)
    streams = asyncio.create_task(run_streams(driver, count=4, max_tokens=30, salt=7))
    await until_under_way(driver)
    await driver.core.core("hold")
    paused = await driver.counters()

    await asyncio.sleep(0.5)
    assert [rank["epoch"] for rank in await driver.status()] == [driver.epoch] * 4  # what the daemon asks is answered
    assert (await driver.counters()).steps_total == paused.steps_total
    assert paused.running + paused.waiting > 0
    await driver.core.core("resume")
    assert_same(await streams, undisturbed)
