"""The processes of real vLLM: alone in their environment, gone with the daemon, noticed when they die or hang."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import pytest

from engines.errors import EngineDied, EngineStartFailed
from engines.vllm.adapter import VllmEngine
from engines.vllm.command import environment
from engines.vllm.run_directory import sweep
from tests.contract.engine_contract import request_of
from tests.support.daemon import Daemon, started
from tests.support.until import until
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


async def test_a_user_rebalances_under_a_stream_and_a_killed_daemon_leaves_nothing(tmp_path: Path) -> None:
    """As a new user would try it, with the demo model; and then the worst that can happen to the daemon."""
    more = f'dtype = "float32"\n[engines.vllm]\npython = "{interpreter()}"\nkv_cache = "32 MiB"\n'
    async with started(tmp_path, ready=True, engine="vllm", stages=3, more=more) as daemon:
        undisturbed = await completed(daemon)
        streaming = asyncio.create_task(completed(daemon))
        code, out, err = await daemon.flexctl("rebalance", "--stages", "2", "--wait")
        assert (code, "done in" in out) == (0, True), err
        assert not streaming.done()
        assert await streaming == undisturbed
        assert len((await daemon.ask("/status"))["stages"]) == 2

        directory, pids = run_directory_of(daemon.process.pid), descendants(daemon.process.pid)
        assert len(pids) >= 3 + 3 + 2  # ranks, their helpers, API server and engine core
        shared = shared_memory(directory)
        daemon.process.kill()
        await daemon.process.wait()
        await until(lambda: not any(runs(pid) for pid in pids), timeout_s=5.0)
    sweep(directory.parent)
    assert not directory.exists()
    assert [path for path in shared if path.exists()] == []


async def completed(daemon: Daemon) -> str:
    """Return the text of a greedy stream of some length."""
    url = (await daemon.ask("/status"))["api_url"]
    body = {"prompt": "Once", "max_tokens": 600, "temperature": 0, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/completions", json=body) as answer:
        assert answer.status == 200
        lines = [line.decode().strip().removeprefix("data: ") async for line in answer.content]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines if line not in ("", "[DONE]"))


def run_directory_of(daemon_pid: int) -> Path:
    """Return the private directory of the vLLM that a daemon has started."""
    (directory,) = (
        owner.parent
        for owner in Path(tempfile.gettempdir()).glob("flexpiped-vllm-*/owner")
        if owner.read_text().split()[0] == str(daemon_pid)
    )
    return directory


def descendants(pid: int) -> list[int]:
    """Return the processes below one."""
    children = [int(child) for of in Path(f"/proc/{pid}/task").glob("*/children") for child in of.read_text().split()]
    return [below for child in children for below in (child, *descendants(child))]


async def test_a_model_that_vllm_refuses_is_refused_in_its_words() -> None:
    engine = VllmEngine(options_for(llama(), ranks=1, max_model_len=1_000_000), layout(), graph=graph_of(llama()))
    with pytest.raises(EngineStartFailed, match=r"max_model_len|maximum"):
        await engine.start(on_progress=lambda _message: None)
    assert not engine.run_directory.exists()
