"""What may go wrong at each step of a handover, and at any time: nothing is lost, and the engine serves on."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from engines.errors import RefactoringAborted, RefactoringBusy, RefactoringRefused
from engines.native.adapter import NativeEngine
from flexpiped.supervisor import Supervisor
from planner.handover import HandoverPhase
from tests.support.native import collect, even, layout, llama, move, options_for, request, running

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]

STREAMS = 6
# Each is waited for in one test, and more than a busy machine ever keeps a process waiting: else others would fail.
PREPARE_S, HANG_S = 4.0, 4.0
BACK_S = 30.0
Result = list[tuple[list[int], list[float]]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[NativeEngine]:
    async with running(llama(), even(2), prepare_deadline_s=PREPARE_S, hang_deadline_s=HANG_S) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(engine: NativeEngine) -> Result:
    return await run_streams(engine)


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def fresh(engine: NativeEngine) -> AsyncIterator[None]:
    """Each test begins with two stages and no failpoint armed, and leaves nothing running.

    Streams may end before a worker does that a test kills at the end of a move: its recovery goes on into the next.
    """
    async with asyncio.timeout(BACK_S):
        while engine.pipeline != even(2):
            with suppress(RefactoringBusy):
                await move(engine, even(2))
    yield
    engine.arm_failpoint("", "")
    counters = await engine.counters()
    assert (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)


def stream(index: int, max_tokens: int = 300):  # type: ignore[no-untyped-def]
    prompt = tuple(5 + (index * 37 + i * 11) % 500 for i in range(20))
    return request(prompt, max_tokens=max_tokens, temperature=0.9 * (index % 2), seed=index)


async def run_streams(engine: NativeEngine) -> Result:
    return list(await asyncio.gather(*(collect(engine, stream(i)) for i in range(STREAMS))))


def tokens(result: Result) -> list[list[int]]:
    return [ids for ids, _ in result]


async def some_tokens_out(engine: NativeEngine) -> None:
    start = (await engine.counters()).generated_tokens_total
    while (await engine.counters()).generated_tokens_total < start + 5 * STREAMS:
        pass  # each question gives the loop a turn


BEFORE_COMMIT = [
    ("core.prepare", -1),
    ("worker.load", 2),
    ("worker.prepared", 2),
    ("core.round", -1),
    ("worker.copy_out", 0),
    ("worker.copy_in", 2),
    ("core.drain", -1),
    ("core.commit", -1),
    ("core.commit.last", -1),
]


@pytest.mark.parametrize(("name", "worker"), BEFORE_COMMIT, ids=[name for name, _ in BEFORE_COMMIT])
async def test_an_error_before_commit_rolls_back_and_disturbs_nobody(
    engine: NativeEngine, undisturbed: Result, name: str, worker: int
) -> None:
    before = await engine.counters()
    epoch = engine.epoch
    streams = asyncio.create_task(run_streams(engine))
    await some_tokens_out(engine)
    engine.arm_failpoint(name, "raise", worker=worker)
    with pytest.raises(RefactoringAborted, match=name.replace(".", r"\.")):
        await move(engine, even(4))
    assert (engine.epoch, engine.pipeline) == (epoch, even(2))
    assert tokens(await streams) == tokens(undisturbed)
    after = await engine.counters()
    assert after.preemptions_total == before.preemptions_total
    assert after.worker_restarts_total == before.worker_restarts_total
    assert [s.kv_mapped_bytes >= 0 for s in await engine.stages()] == [True, True]
    assert (await move(engine, even(4))).phase is HandoverPhase.DONE  # and the next one works


@pytest.mark.parametrize(("name", "worker"), [("core.retire", -1), ("worker.release", 0)])
async def test_an_error_after_commit_goes_forward(
    engine: NativeEngine, undisturbed: Result, name: str, worker: int
) -> None:
    streams = asyncio.create_task(run_streams(engine))
    await some_tokens_out(engine)
    engine.arm_failpoint(name, "raise", worker=worker)
    report = await move(engine, even(4))
    assert (report.phase, engine.pipeline) == (HandoverPhase.DONE, even(4))
    assert name in report.message
    assert tokens(await streams) == tokens(undisturbed)


async def test_a_prepare_that_takes_too_long_rolls_back(engine: NativeEngine, undisturbed: Result) -> None:
    streams = asyncio.create_task(run_streams(engine))
    engine.arm_failpoint("worker.load", "stall", worker=3)
    with pytest.raises(RefactoringAborted, match="longer than"):
        await move(engine, even(4))
    assert tokens(await streams) == tokens(undisturbed)


async def test_a_cancelled_refactoring_rolls_back(engine: NativeEngine, undisturbed: Result) -> None:
    streams = asyncio.create_task(run_streams(engine))
    engine.arm_failpoint("worker.load", "stall", worker=3)  # keeps it in prepare
    moving = asyncio.create_task(move(engine, even(4)))
    while not await engine.cancel_refactor():
        pass
    with pytest.raises(RefactoringAborted, match="cancelled"):
        await moving
    assert tokens(await streams) == tokens(undisturbed)


async def test_a_second_refactoring_is_told_what_is_going_on(engine: NativeEngine) -> None:
    engine.arm_failpoint("worker.load", "stall", worker=3)
    reports = aiter(engine.refactor(even(4)))
    await anext(reports)
    with pytest.raises(RefactoringBusy, match="to 4 stages, preparing"):
        await move(engine, even(8))
    await engine.cancel_refactor()
    with pytest.raises(RefactoringAborted):
        async for _report in reports:
            pass


LOST = [
    ("worker.load", 2, RefactoringAborted),  # a destination without a stage: nobody is disturbed
    ("worker.copy_in", 2, RefactoringAborted),
    ("worker.copy_out", 1, RefactoringAborted),  # a source: a crash as well
    ("worker.step", 0, None),
    ("worker.adopt", 1, None),  # at the commit point: recovered in the new layout
    ("worker.adopt", 3, None),
    ("worker.release", 0, None),
]


@pytest.mark.parametrize(("name", "worker", "error"), LOST, ids=[f"{n}-{w}" for n, w, _ in LOST])
async def test_a_worker_killed_at_any_step_costs_no_token(
    engine: NativeEngine, undisturbed: Result, name: str, worker: int, error: type[Exception] | None
) -> None:
    before = await engine.counters()
    streams = asyncio.create_task(run_streams(engine))
    await some_tokens_out(engine)
    engine.arm_failpoint(name, "kill", worker=worker)
    if name == "worker.step":
        pass
    elif error is not None:
        with pytest.raises(error):
            await move(engine, even(4))
    else:
        assert (await move(engine, even(4))).epoch == engine.epoch
        assert engine.pipeline == even(4)
    assert tokens(await streams) == tokens(undisturbed)
    after = await engine.counters()
    assert after.worker_restarts_total == before.worker_restarts_total + 1
    if (name, worker) in (("worker.load", 2), ("worker.copy_in", 2)):
        assert after.preemptions_total == before.preemptions_total  # no request was disturbed


@pytest.mark.parametrize("victim", [0, 1])
async def test_kill_9_of_a_stage_worker_is_recovered_exactly(
    engine: NativeEngine, undisturbed: Result, victim: int
) -> None:
    streams = asyncio.create_task(run_streams(engine))
    await some_tokens_out(engine)
    os.kill((await engine.stages())[victim].pids[0], signal.SIGKILL)
    assert tokens(await streams) == tokens(undisturbed)
    assert (await move(engine, even(8))).phase is HandoverPhase.DONE


async def test_a_worker_that_hangs_is_replaced(engine: NativeEngine, undisturbed: Result) -> None:
    streams = asyncio.create_task(run_streams(engine))
    await some_tokens_out(engine)
    os.kill((await engine.stages())[1].pids[0], signal.SIGSTOP)
    assert tokens(await streams) == tokens(undisturbed)


async def test_what_does_not_fit_is_refused_with_the_numbers(undisturbed: Result) -> None:
    del undisturbed
    async with running(llama(), even(8), device_memory_bytes=5 << 20) as small:
        check = await small.check_refactor(even(1))
        assert not check.feasible
        with pytest.raises(RefactoringRefused, match=r"MiB free on cpu:0.*too few.*KV"):
            await move(small, even(1))
        assert small.pipeline == even(8)


async def test_a_layout_with_unknown_devices_is_refused(engine: NativeEngine) -> None:
    with pytest.raises(RefactoringRefused, match="gpu:0"):
        await move(engine, layout(devices=("gpu:0",)))


async def test_the_engine_core_killed_requests_go_on_from_the_callers_copy(undisturbed: Result) -> None:
    supervisor = Supervisor(
        factory=lambda pipeline, epoch: NativeEngine(options_for(llama()), pipeline, epoch=epoch), pipeline=even(2)
    )
    await supervisor.start()
    engine = supervisor.engine
    assert isinstance(engine, NativeEngine)
    await move(engine, even(4))

    async def run(index: int) -> list[int]:
        ids: list[int] = []
        async for chunk in supervisor.generate(stream(index)):
            ids += chunk.token_ids
        return ids

    streams = asyncio.gather(*(run(i) for i in range(STREAMS)))
    await some_tokens_out(engine)
    os.kill(engine.core_pid, signal.SIGKILL)
    assert await streams == tokens(undisturbed)
    assert supervisor.pipeline == even(4)
    assert supervisor.engine is not None
    assert supervisor.engine.epoch == 1
    await supervisor.close()


async def test_an_engine_that_is_not_ready_ends_at_once() -> None:
    """Asked to, it would end only when it has read its weights: until then it hears nothing."""
    engine, loop = NativeEngine(options_for(llama()), even(2)), asyncio.get_running_loop()
    reached = asyncio.Event()
    starting = asyncio.create_task(engine.start(on_progress=lambda _message: reached.set()))
    await reached.wait()
    pid = engine.core_pid
    os.kill(pid, signal.SIGSTOP)  # as deaf as one that imports torch, however fast the machine is
    starting.cancel()
    began_s = loop.time()
    await engine.close()
    assert loop.time() - began_s < 2.0
    assert not alive(pid)


async def test_the_daemon_killed_no_process_lives_after_5_s() -> None:
    program = (
        "import asyncio, sys\n"
        "from tests.support.native import even, llama, running\n"
        "async def main():\n"
        "    async with running(llama(), even(2)) as engine:\n"
        "        print(*engine.worker_pids, engine.core_pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in (await process.stdout.readline()).split()]
    assert len(pids) == 9
    process.kill()
    await process.wait()
    deadline = asyncio.get_running_loop().time() + 5.0
    while any(alive(pid) for pid in pids):
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
