"""The processes of real vLLM: alone in their environment, and gone with the daemon."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from engines.errors import EngineStartFailed
from engines.served.run_directory import sweep
from engines.vllm.adapter import VllmEngine
from engines.vllm.command import environment
from tests.support.daemon import Daemon, run_until_exit, started, write_config
from tests.support.until import until
from tests.support.vllm import graph_of, interpreter, layout, llama, options_for
from tests.vllm.remains import descendants, run_directory_of, runs, shared_memory

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop]

ROOT = Path(__file__).parents[2]


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
        await assert_second_daemons_are_told_off(tmp_path, await daemon.ask("/status"), more)
        assert await completed(daemon) == undisturbed

        directory, pids = run_directory_of(daemon.process.pid), descendants(daemon.process.pid)
        assert len(pids) >= 3 + 3 + 2  # ranks, their helpers, API server and engine core
        shared = shared_memory(directory)
        daemon.process.kill()
        await daemon.process.wait()
        await until(lambda: not any(runs(pid) for pid in pids), timeout_s=5.0)
    sweep(directory.parent)
    assert not directory.exists()
    assert [path for path in shared if path.exists()] == []


async def assert_second_daemons_are_told_off(tmp_path: Path, status: dict[str, Any], more: str) -> None:
    """On the port of the first, or with too little memory: before a second vLLM is started."""
    second = tmp_path / "second"
    second.mkdir()
    port = urlsplit(status["api_url"]).port
    assert port is not None
    small = f'devices.cpu_memory = "2 MiB"\n{more}'
    for config, reason in (
        ({"port": port, "more": more}, f"cannot listen on 127.0.0.1:{port}: Address already in use"),
        ({"more": small}, "needs"),
    ):
        code, log = await run_until_exit(write_config(second, engine="vllm", **config))
        assert (code, reason in log, "starting vLLM" in log) == (1, True, False), log


async def completed(daemon: Daemon) -> str:
    """Return the text of a greedy stream of some length."""
    url = (await daemon.ask("/status"))["api_url"]
    body = {"prompt": "Once", "max_tokens": 600, "temperature": 0, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/completions", json=body) as answer:
        assert answer.status == 200
        lines = [line.decode().strip().removeprefix("data: ") async for line in answer.content]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines if line not in ("", "[DONE]"))


@pytest.mark.long
async def test_memory_that_vllm_does_not_get_is_an_error_in_its_words() -> None:
    """Where the daemon's own sums had let it pass."""
    options = options_for(llama(), ranks=1, kv_cache_bytes=1 << 46, device_memory_bytes=1 << 47)
    engine = VllmEngine(options, layout(), graph=graph_of(llama()))
    with pytest.raises(EngineStartFailed, match=r"(?i)memory"):
        await engine.start(on_progress=lambda _message: None)
    assert not engine.run_directory.exists()


async def test_a_model_that_vllm_refuses_is_refused_in_its_words() -> None:
    engine = VllmEngine(options_for(llama(), ranks=1, max_model_len=1_000_000), layout(), graph=graph_of(llama()))
    with pytest.raises(EngineStartFailed, match=r"max_model_len|maximum"):
        await engine.start(on_progress=lambda _message: None)
    assert not engine.run_directory.exists()
