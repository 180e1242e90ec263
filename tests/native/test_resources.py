"""What the processes take, and that what a worker gave up is really given back: by the kernel's count."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from engines.errors import RefactoringAborted, RefactoringBusy
from engines.native.adapter import NativeEngine
from engines.process import memory_pss_bytes
from engines.protocol import GenerationRequest
from tests.support import checkpoints
from tests.support.native import CACHE, collect, even, llama, move, request, running
from tests.support.until import until

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]

DEMO = Path(__file__).parents[2] / "etc" / "demo-model"
MIB = 1 << 20


def big_llama() -> Path:
    """34 MB of weights, so that pages of weights stand out from those of the interpreter."""
    return checkpoints.bench_llama(CACHE / "bench-llama")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[NativeEngine]:
    async with running(big_llama(), even(1), kv_cache_bytes=128 * MIB, max_model_len=1536) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def one_stage(engine: NativeEngine) -> NativeEngine:
    if engine.pipeline != even(1):
        await move(engine, even(1))
    return engine


def pss(pid: int) -> int:
    value = memory_pss_bytes(pid)
    assert value is not None
    return value


def cpu_s(pids: tuple[int, ...]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def fill_kv(engine: NativeEngine) -> None:
    prompt = tuple(5 + i % 4000 for i in range(1500))
    await asyncio.gather(*(collect(engine, request(prompt[i:], max_tokens=2)) for i in range(2)))


async def test_a_move_gives_the_memory_back(one_stage: NativeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine = one_stage
    await fill_kv(engine)
    worker = (await engine.stages())[0].pids[0]
    before = pss(worker)
    mapped = (await engine.stages())[0].kv_mapped_bytes
    report = await move(engine, even(8))
    after = pss(worker)
    with capsys.disabled():
        print(f"\nPSS of the worker that gave up 7 of 8 decoders: {before / MIB:.1f} -> {after / MIB:.1f} MiB")
    expected = (mapped + 24 * MIB) * 7 // 8  # KV blocks and the decoders' weights (24 of 34 MB)
    assert report.returned_bytes > expected
    assert before - after > 0.85 * expected
    assert (await engine.stages())[0].kv_mapped_bytes < mapped / 4


async def test_a_rolled_back_move_leaves_nothing_behind(one_stage: NativeEngine) -> None:
    destination = one_stage.worker_pids[3]
    before = pss(destination)
    one_stage.arm_failpoint("core.commit", "raise")
    with pytest.raises(RefactoringAborted, match=r"core\.commit"):
        await move(one_stage, even(4))
    assert pss(destination) - before < 2 * MIB


async def begin_above_others(
    engine: NativeEngine, wanted: list[GenerationRequest]
) -> "list[asyncio.Task[tuple[list[int], list[float]]]]":
    """Start requests behind four long ones, which then go: KV blocks of the first numbers are free."""
    long = [request((5 + n, *(5 + i % 4000 for i in range(699))), max_tokens=100) for n in range(4)]
    others = [asyncio.create_task(collect(engine, each)) for each in long]
    await until(lambda: holds(engine, running=4, kv_blocks=4 * 700 // 16), timeout_s=60.0)
    streams = [asyncio.create_task(collect(engine, each)) for each in wanted]
    await until(lambda: holds(engine, running=4 + len(wanted), kv_blocks=1), timeout_s=60.0)
    for each in others:
        each.cancel()
    await asyncio.wait(others)
    await until(lambda: holds(engine, running=len(wanted), kv_blocks=1), timeout_s=60.0)
    return streams


async def holds(engine: NativeEngine, *, running: int, kv_blocks: int) -> bool:
    counters = await engine.counters()
    return counters.running == running and counters.kv_blocks_used >= kv_blocks


async def test_fewer_kv_blocks_give_memory_back_under_running_streams(
    one_stage: NativeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the kernel's count; streams say what they say undisturbed, and the KV cache grows again."""
    engine, bounds = one_stage, one_stage.capabilities.kv_range
    assert bounds is not None
    [worker] = (await engine.stages())[0].pids
    wanted = [request(tuple(range(10 + i, 300 + i)), max_tokens=240) for i in range(3)]
    expected = [tokens for tokens, _ in await asyncio.gather(*(collect(engine, each) for each in wanted))]
    streams = await begin_above_others(engine, wanted)
    before, mapped = pss(worker), (await engine.stages())[0].kv_mapped_bytes

    returned = await engine.resize_kv(bounds.least_blocks)

    after, left = pss(worker), (await engine.stages())[0].kv_mapped_bytes
    with capsys.disabled():
        print(f"\nKV mapped {mapped / MIB:.1f} -> {left / MIB:.1f} MiB, PSS fell by {(before - after) / MIB:.1f} MiB")
    assert (await engine.counters()).running == len(wanted)
    assert left <= mapped / 2
    assert returned == pytest.approx(mapped - left, abs=MIB)  # steps went on meanwhile
    assert before - after > 0.8 * returned
    assert await engine.resize_kv(bounds.most_blocks) == 0
    assert [(await each)[0] for each in streams] == expected
    assert (await engine.counters()).preemptions_total == 0


async def test_a_worker_lost_while_the_kv_cache_shrinks_is_recovered(engine: NativeEngine) -> None:
    """Moves, deaths and changes of the KV cache: each waits for the other, or says that it is busy."""
    if engine.pipeline != even(2):
        await move(engine, even(2))
    bounds = engine.capabilities.kv_range
    assert bounds is not None
    wanted = [request(tuple(range(10 + i, 200 + i)), max_tokens=100) for i in range(4)]
    expected = [(await collect(engine, each))[0] for each in wanted]
    streams = await begin_above_others(engine, wanted)
    shrinking = asyncio.create_task(engine.resize_kv(bounds.least_blocks))
    await asyncio.sleep(0)
    with pytest.raises(RefactoringBusy, match="the number of KV blocks is being changed"):
        await move(engine, even(4))
    os.kill(engine.worker_pids[1], signal.SIGKILL)
    await shrinking
    await until(lambda: recovered(engine), timeout_s=60.0)
    moving = asyncio.create_task(move(engine, even(4)))
    await asyncio.sleep(0)
    with pytest.raises(RefactoringBusy, match="a refactoring is under way"):
        await engine.resize_kv(bounds.most_blocks)
    await moving
    await engine.resize_kv(bounds.most_blocks)
    assert [(await each)[0] for each in streams] == expected
    assert (await engine.counters()).kv_blocks_used == 0


async def test_a_kv_cache_that_cannot_grow_says_so_at_once_and_stays_as_it_was(engine: NativeEngine) -> None:
    """One worker has no memory for it; fewer KV blocks there are also where one cannot give its memory back."""
    bounds = engine.capabilities.kv_range
    assert bounds is not None
    engine.arm_failpoint("worker.bound", "raise", worker=3)
    await engine.resize_kv(bounds.least_blocks)
    engine.arm_failpoint("worker.bound", "raise", worker=3)
    async with asyncio.timeout(20.0):
        with pytest.raises(RefactoringBusy, match=r"FailpointHit: failpoint worker\.bound"):
            await engine.resize_kv(bounds.most_blocks)
    assert (await engine.counters()).kv_blocks_capacity == bounds.least_blocks
    await engine.resize_kv(bounds.most_blocks)
    assert (await engine.counters()).kv_blocks_capacity == bounds.most_blocks


async def test_who_asks_of_the_stages_is_told_also_where_a_worker_is_lost_meanwhile(engine: NativeEngine) -> None:
    """Whoever watches the memory would else watch no more."""
    [pid] = (await engine.stages())[0].pids
    os.kill(pid, signal.SIGSTOP)
    stages, steps = asyncio.create_task(engine.stages()), asyncio.create_task(engine.stage_steps())
    await engine.counters()  # the core has asked the worker
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60.0):
        assert (await stages)[0].pids != (pid,)
        await steps
    await until(lambda: recovered(engine), timeout_s=60.0)


async def recovered(engine: NativeEngine) -> bool:
    """Whether the KV cache can be changed again: to what it is."""
    with suppress(RefactoringBusy):
        await engine.resize_kv((await engine.counters()).kv_blocks_capacity)
        return (await engine.counters()).worker_restarts_total > 0
    return False


async def test_preparing_never_holds_a_worker_for_long(one_stage: NativeEngine) -> None:
    """A slice of preparing takes at most 5 ms of processor time, with weights as large as the benchmarks use."""
    stream = asyncio.create_task(collect(one_stage, request(tuple(range(5, 40)), max_tokens=150)))
    for stages in (2, 4, 8, 1, 2):
        await move(one_stage, even(stages))
    await one_stage.stages()
    assert one_stage.longest_slice_s <= 0.005
    await stream


async def test_a_daemon_without_the_kernel_serves_the_same(engine: NativeEngine, tmp_path: Path) -> None:
    """Where there is no C compiler the torch path attends; the tokens are the same."""
    prompt = tuple(range(20, 60))
    assert engine.attention == "compiled"
    expected = (await collect(engine, request(prompt, max_tokens=24)))[0]
    blocker = tmp_path / "not-a-directory"
    blocker.touch()
    async with running(big_llama(), even(2), cache_directory=str(blocker)) as without:
        assert without.attention.startswith("torch")
        assert (await collect(without, request(prompt, max_tokens=24)))[0] == expected


async def test_idle_workers_cost_next_to_nothing() -> None:
    """Eight resident workers and the core: under 1 % of a core and under 2 GiB together, with the demo model."""
    async with running(DEMO, even(2), nice=10) as engine:
        assert len((await collect(engine, request((0, 300), max_tokens=64)))[0]) == 64
        pids = (engine.core_pid, *engine.worker_pids)
        await asyncio.sleep(1.0)  # threads of the last step have gone to sleep
        start = cpu_s(pids)
        await asyncio.sleep(4.0)
        assert cpu_s(pids) - start < 0.01 * 4.0
        assert sum(pss(pid) for pid in pids) < 2 << 30


@pytest.mark.long  # two boots; how many threads a stage gets is tested without an engine, too
@pytest.mark.parametrize(("threads_per_device", "helpers"), [(0, 1), (1, 0)])
async def test_a_single_stage_has_no_more_threads_than_its_device(threads_per_device: int, helpers: int) -> None:
    """A worker without a stage has one thread that computes; the stage's has as many, or one to help it."""
    async with running(llama(), even(1), threads=2, threads_per_device=threads_per_device) as engine:
        await collect(engine, request((5, 6, 7), max_tokens=4))
        [busy], idle = (await engine.stages())[0].pids, engine.worker_pids[1]
        await until(lambda: num_threads(busy) - num_threads(idle) == helpers)  # one that has read weights ends late


def num_threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
