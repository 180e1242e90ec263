"""Compiled mode on real vLLM (CPU, fp32): a move falls back to eager, and what was compiled outside is loaded later."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engines.vllm.adapter import VllmEngine
from engines.vllm.recompile import LOAD_LIMIT_S, Recompilation
from tests.support.daemon import ROOT
from tests.support.until import until
from tests.support.vllm import llama, running
from tests.vllm.remains import runs
from tests.vllm.streams import Result, assert_same, move, on_ranks, run_streams

pytestmark = [
    pytest.mark.engine,
    pytest.mark.vllm,
    pytest.mark.real_loop,
    pytest.mark.asyncio(loop_scope="module"),
]
START, OTHER, THIRD = on_ranks(4, 4), on_ranks(5, 3), on_ranks(2, 6)
STREAMS = 4


class Compiled:
    """One vLLM in compiled mode, how each return to compiled code ended, and what streams say undisturbed."""

    def __init__(self, engine: VllmEngine, ended: list[Recompilation], undisturbed: Result) -> None:
        self.engine = engine
        self.ended = ended
        self.undisturbed = undisturbed

    async def go_back(self) -> None:
        """Return to the layout of the start, whose code is in the cache."""
        await move(self.engine, START)
        await self.engine.recompiled()
        assert await self.runs() == ["compiled", "compiled"]

    async def runs(self) -> list[str]:
        return [stage.runs for stage in await self.engine.stages()]

    async def compiling_pid(self) -> int:
        """Return the process that compiles, as soon as there is one."""
        found: list[int] = []

        async def is_there() -> bool:
            status = [await self.engine.rank_status(rank) for rank in range(2)]
            found[:] = [one["compiling_pid"] for one in status if one["compiling_pid"]]
            return bool(found)

        await until(is_there, timeout_s=60.0)
        return found[0]

    async def check_streams(self) -> None:
        assert_same(await run_streams(self.engine, count=STREAMS), self.undisturbed)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def compiled(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Compiled]:
    ended: list[Recompilation] = []
    env = {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm-cache"))}  # else nothing would be left to compile
    async with running(llama(), START, ranks=2, on_recompiled=ended.append, compile=True, env=env) as engine:
        yield Compiled(engine, ended, await run_streams(engine, count=STREAMS))


async def streams_until(compiled: Compiled, done: asyncio.Task[None]) -> int:
    """Renew streams until something is done, and compare each; return how often."""
    times = 0
    while not done.done():
        await compiled.check_streams()
        times += 1
    return times


async def test_a_move_changes_nothing_and_ends_in_compiled_code(compiled: Compiled) -> None:
    engine = compiled.engine
    assert engine.capabilities.refactors_in_place
    assert await compiled.runs() == ["compiled", "compiled"]
    streams = asyncio.create_task(run_streams(engine, count=STREAMS))
    await move(engine, OTHER)
    assert await compiled.runs() == ["eager", "eager"]
    assert_same(await streams, compiled.undisturbed)
    await compiled.check_streams()  # beside the helper; it is done sooner without
    await engine.recompiled()
    assert await compiled.runs() == ["compiled", "compiled"]
    await compiled.check_streams()
    last = compiled.ended[-1]
    assert last.compiled
    assert last.compile_s > 0
    assert last.stall_s is not None
    assert 0 < last.stall_s < LOAD_LIMIT_S
    assert "compiled again after" in last.message
    assert f"load stalled steps for {last.stall_s * 1e3:.0f} ms" in last.message


async def test_a_layout_that_was_in_force_before_is_not_compiled_again(compiled: Compiled) -> None:
    await move(compiled.engine, OTHER)
    again = asyncio.create_task(compiled.engine.recompiled())
    assert await streams_until(compiled, again) > 0  # the load lies between steps of these
    assert compiled.ended[-1].compiled
    await compiled.go_back()
    assert compiled.ended[-1].compile_s == 0
    await compiled.check_streams()


async def test_a_move_ends_what_is_being_compiled(compiled: Compiled) -> None:
    await compiled.go_back()
    ended = len(compiled.ended)
    await move(compiled.engine, THIRD)
    pid = await compiled.compiling_pid()
    await compiled.go_back()
    await until(lambda: not runs(pid), timeout_s=60.0)
    assert len(compiled.ended) == ended + 1  # of the second move alone
    assert compiled.ended[-1].compiled
    await compiled.check_streams()


async def test_a_rank_whose_helper_was_killed_stays_eager_and_says_so(compiled: Compiled) -> None:
    await compiled.go_back()
    await move(compiled.engine, THIRD)
    os.kill(await compiled.compiling_pid(), signal.SIGKILL)
    await compiled.engine.recompiled()
    assert not compiled.ended[-1].compiled
    assert "stays eager: the process that compiles was ended" in compiled.ended[-1].message
    assert await compiled.runs() == ["eager", "eager"]
    await compiled.check_streams()
    await compiled.go_back()


async def test_a_load_that_would_take_too_long_is_not_done(compiled: Compiled) -> None:
    await compiled.go_back()
    await compiled.engine.arm_failpoint("worker.slow_load", "skip", rank=1)
    await move(compiled.engine, OTHER)
    await compiled.engine.recompiled()
    await compiled.engine.arm_failpoint("", "", rank=1)
    assert "loading its code would stall steps for 3600.0 s, more than 1 s" in compiled.ended[-1].reason
    assert await compiled.runs() == ["eager", "eager"]
    await compiled.go_back()


async def test_a_rank_that_cannot_load_keeps_the_others_eager_too(compiled: Compiled) -> None:
    await compiled.go_back()
    await compiled.engine.arm_failpoint("worker.load_compiled", "fail", rank=1)
    await move(compiled.engine, OTHER)
    await compiled.engine.recompiled()
    assert "worker.load_compiled" in compiled.ended[-1].reason
    assert await compiled.runs() == ["eager", "eager"]
    await compiled.check_streams()
    await compiled.go_back()


@pytest.mark.long
async def test_moves_in_both_directions_with_a_drained_rank_change_nothing(compiled: Compiled) -> None:
    for target in (on_ranks(8, 0), on_ranks(1, 7), on_ranks(8, 0), OTHER, START):
        streams = asyncio.create_task(run_streams(compiled.engine, count=STREAMS))
        await move(compiled.engine, target)
        again = asyncio.create_task(compiled.engine.recompiled())
        await streams_until(compiled, again)
        assert_same(await streams, compiled.undisturbed)
        assert compiled.ended[-1].compiled
        await compiled.check_streams()


_DAEMON = """
import asyncio, sys
from pathlib import Path
from tests.support.vllm import layout, llama, running
from tests.vllm.streams import move, on_ranks

def group_of(leader):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[2]) == leader:
                    found.append(int(entry.name))
            except OSError:
                pass
    return found

async def main():
    async with running(llama(), layout(4), ranks=2, compile=True, env={"VLLM_CACHE_ROOT": sys.argv[1]}) as engine:
        await move(engine, on_ranks(5, 3))
        members = []
        while len(members) < 4:  # guard, what it has forked, the compiler, and what that runs
            guard = max([(await engine.rank_status(rank))["compiling_pid"] for rank in range(2)])
            members = group_of(guard) if guard else []
            await asyncio.sleep(0.002)
        print(*members, *engine.pids["helpers"], *engine.pids["workers"], flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.long
async def test_a_killed_daemon_leaves_nothing_that_compiles(tmp_path: Path) -> None:
    """The compilers that torch starts know nothing of a parent's death: the guard ends them."""
    await asyncio.to_thread(_kill_while_compiling, tmp_path)


def _kill_while_compiling(cache: Path) -> None:
    command = [sys.executable, "-c", _DAEMON, str(cache)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        pids = [int(word) for word in child.stdout.readline().split()]
        child.kill()
    assert len(pids) >= 10  # with two helpers and a worker for each rank
    give_up_s = time.monotonic() + 60.0
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < give_up_s, [pid for pid in pids if runs(pid)]
        time.sleep(0.05)
