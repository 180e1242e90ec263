"""The processes of real vLLM: alone in their environment, gone with the daemon, noticed when they die or hang."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines.errors import EngineDied, EngineStartFailed
from engines.vllm.adapter import VllmEngine
from engines.vllm.command import environment
from engines.vllm.run_directory import sweep
from engines.vllm.server import members_of
from tests.contract.engine_contract import request_of
from tests.support.vllm import graph_of, interpreter, layout, llama, options_for, running

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop]

ROOT = Path(__file__).parents[2]


def shared_memory(run_directory: Path) -> list[Path]:
    names = (run_directory / "shared-memory").read_text().split()
    return [Path("/dev/shm") / name for name in names]


def processes_of(engine: VllmEngine) -> list[int]:
    pids = engine.pids
    return [pids["api"], pids["core"], *pids["workers"], *pids["helpers"]]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_nothing_of_the_daemon_can_be_imported_there(tmp_path: Path) -> None:
    options = options_for(llama(), ranks=1)
    env = environment(
        options,
        counts=(8,),
        run_dir=tmp_path,
        inherited=dict(os.environ) | {"PYTHONPATH": str(ROOT), "VIRTUAL_ENV": sys.prefix},
        daemon_prefix=sys.prefix,
        cores=1,
    )
    names = ("flexpiped", "engines", "planner", "topology", "structlog", "ortools", "vllm", "flexpiped_vllm")
    probe = f"import importlib.util as u; print(*[n for n in {names!r} if u.find_spec(n)])"
    found = subprocess.run(
        [interpreter(), "-c", probe], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["vllm", "flexpiped_vllm"]


async def test_the_death_of_a_worker_is_noticed_and_nothing_is_left() -> None:
    async with running(llama(), layout(4), ranks=2) as engine:
        directory, pids = engine.run_directory, processes_of(engine)
        shared = shared_memory(directory)
        assert shared
        assert all(path.exists() for path in shared)
        stream = engine.generate(request_of(max_tokens=1000))
        await anext(stream)
        started_s = time.monotonic()
        os.kill(engine.pids["workers"][1], signal.SIGKILL)
        reason = await engine.died()
        assert time.monotonic() - started_s < 2.0
        assert "worker of rank 1" in reason
        with pytest.raises(EngineDied):
            [chunk async for chunk in stream]
        await engine.close()
        assert [pid for pid in pids if runs(pid)] == []
        assert [path for path in shared if path.exists()] == []
        assert not directory.exists()


async def test_a_core_that_is_stopped_is_a_hang_and_is_replaced() -> None:
    async with running(llama(), layout(), ranks=1, hang_deadline_s=3.0) as engine:
        stream = engine.generate(request_of(max_tokens=1000))
        await anext(stream)
        os.kill(engine.pids["core"], signal.SIGSTOP)
        with pytest.raises(EngineDied, match="hung: work is pending and no step has finished"):
            async with asyncio.timeout(10.0):
                [chunk async for chunk in stream]


def test_a_killed_daemon_leaves_no_process_and_the_next_cleans_up() -> None:
    daemon = """
import asyncio
from tests.support.vllm import layout, llama, running
async def main():
    async with running(llama(), layout(4), ranks=2) as engine:
        pids = engine.pids
        print(engine.run_directory, pids["api"], pids["core"], *pids["workers"], *pids["helpers"], flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", daemon], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        words = child.stdout.readline().split()
        child.kill()
    directory, pids = Path(words[0]), [int(word) for word in words[1:]]
    assert len(pids) >= 4
    shared = shared_memory(directory)
    give_up_s = time.monotonic() + 5.0
    while members_of(pids[0]) or any(runs(pid) for pid in pids):
        assert time.monotonic() < give_up_s, [pid for pid in pids if runs(pid)]
        time.sleep(0.05)
    sweep(directory.parent)
    assert not directory.exists()
    assert [path for path in shared if path.exists()] == []


async def test_a_model_that_vllm_refuses_is_refused_in_its_words() -> None:
    engine = VllmEngine(options_for(llama(), ranks=1, max_model_len=1_000_000), layout(), graph=graph_of(llama()))
    with pytest.raises(EngineStartFailed, match=r"max_model_len|maximum"):
        await engine.start(on_progress=lambda _message: None)
    assert not engine.run_directory.exists()
