"""What tests of engines that outlive their daemon share: their records, and one engine through several daemons."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from engines.process import state_of
from tests.support.daemon import Daemon, completed, started
from tests.support.until import until
from tests.support.vllm import llama

BODY = {"prompt": "Once", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
Json = dict[str, Any]


def survive(*, adopt_within_s: float = 120.0) -> str:
    """Return the lines of a configuration with which engines outlive the daemon."""
    return f"engines.survive_restart = true\nengines.adopt_within_s = {adopt_within_s}\n"


def records(folder: Path) -> list[Json]:
    return [json.loads(file.read_text()) for file in folder.glob("state/engines/*/*.json")]


@contextmanager
def none_left(folder: Path) -> Iterator[None]:
    """End what engines are left of daemons that lived there, as nobody else would for a while."""
    try:
        yield
    finally:
        for record in records(folder):
            with suppress(ProcessLookupError):
                os.kill(record["pid"], signal.SIGKILL)


def runs(pid: int) -> bool:
    state = state_of(pid)
    return state is not None and state[0] not in "ZX"


def family(pid: int) -> list[int]:
    """Return the process ids of a process and of all below it."""
    children = [int(child) for of in Path(f"/proc/{pid}/task").glob("*/children") for child in of.read_text().split()]
    return [pid, *(below for child in children for below in family(child))]


async def text_of(daemon: Daemon, body: Json = BODY) -> str:
    url = (await daemon.ask("/status"))["api_url"]
    async with aiohttp.ClientSession() as http:
        return await completed(http, url, body)


async def end(daemon: Daemon, number: signal.Signals) -> None:
    daemon.process.send_signal(number)
    await daemon.process.wait()


async def begin_stream(daemon: Daemon, http: aiohttp.ClientSession) -> aiohttp.ClientResponse:
    """Return a stream that has begun and goes on for long."""
    url = (await daemon.ask("/status"))["api_url"]
    answer = await http.post(f"{url}/completions", json=BODY | {"max_tokens": 1500, "stream": True})
    await answer.content.readline()
    return answer


async def moved(daemon: Daemon, *, stages: int) -> None:
    code, out, err = await daemon.flexctl("rebalance", "--stages", str(stages), "--wait")
    assert code == 0, out + err


def later_workers(pids: list[int], title: str) -> list[int]:
    """Return the workers among ``pids``, whose command lines begin with ``title``, but for those of the first rank.

    That one may have to answer for the whole engine.
    """
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in pids}
    return [pid for pid, its in titles.items() if its.startswith(title) and "PP0" not in its]


async def stop_in_prepare(daemon: Daemon, workers: list[int], *, stages: int) -> None:
    """Kill the daemon while a handover prepares: its workers are held until it is gone."""
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        answer = await daemon.ask("/rebalance", {"stages": stages})
        assert answer.get("state") == "started", answer
        await end(daemon, signal.SIGKILL)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)


async def through_several_daemons(folder: Path, *, engine: str, python: str, workers: str) -> None:
    """One engine of three ranks, started once: four daemons come and go, in each way, and then nobody comes.

    ``workers``: what the titles of its workers begin with.
    """
    own = f'[engines.{engine}]\npython = "{python}"\nkv_cache = "32 MiB"\n'
    with none_left(folder):
        await _come_and_go(
            folder, engine=engine, workers=workers, more=f'model = "{llama()}"\ndtype = "float32"\n{own}'
        )


async def _come_and_go(folder: Path, *, engine: str, workers: str, more: str) -> None:
    def daemon_of(*, adopt_within_s: float = 120.0) -> Any:
        lines = survive(adopt_within_s=adopt_within_s) + 'devices.parameter_cache = "64 MiB"\n' + more
        return started(folder, ready=True, engine=engine, stages=3, more=lines)

    async with daemon_of() as daemon:  # killed while a stream runs, in another layout than the configured one
        await moved(daemon, stages=2)
        undisturbed = await text_of(daemon)
        [record] = records(folder)
        processes = family(record["pid"])
        assert len(processes) > 3
        async with aiohttp.ClientSession() as http:
            await begin_stream(daemon, http)
            await end(daemon, signal.SIGKILL)

    async with daemon_of() as daemon:  # killed in the midst of a move
        await assert_adopted(daemon, epoch=1, stages=2)
        assert set(processes) <= set(family(record["pid"]))
        assert await text_of(daemon) == undisturbed
        await moved(daemon, stages=3)
        assert await text_of(daemon) == undisturbed
        await stop_in_prepare(daemon, later_workers(family(record["pid"]), workers), stages=2)

    async with daemon_of() as daemon:  # asked to end
        await assert_adopted(daemon, epoch=2, stages=3)
        history = [event["message"] for event in (await daemon.ask("/history"))["events"]]
        assert any("a change to 2 stages was broken off" in message for message in history)
        assert (await daemon.ask("/status"))["parameter_cache"]["layers"] == 0
        await moved(daemon, stages=2)
        assert (await daemon.ask("/status"))["parameter_cache"]["layers"] > 0  # this daemon keeps them now
        assert await text_of(daemon) == undisturbed
        await end(daemon, signal.SIGTERM)

    async with daemon_of(adopt_within_s=1.0) as daemon:  # the last
        await assert_adopted(daemon, epoch=3, stages=2)
        assert await text_of(daemon) == undisturbed
        assert [each["pid"] for each in records(folder)] == [record["pid"]]
        everything = family(record["pid"])
        assert set(processes) <= set(everything)
        await end(daemon, signal.SIGKILL)
    await until(lambda: not any(runs(pid) for pid in everything), timeout_s=60.0)


async def assert_adopted(daemon: Daemon, *, epoch: int, stages: int) -> None:
    """It goes on in that layout, and nothing of the daemon before is left in it."""
    assert "engine adopted" in daemon.output.read_text()
    status = await daemon.ask("/status")
    assert (status["epoch"], len(status["stages"])) == (epoch, stages)
    await until(lambda: is_empty(daemon), timeout_s=30.0)


async def is_empty(daemon: Daemon) -> bool:
    counters = (await daemon.ask("/status"))["engine_counters"]
    return (counters["running"], counters["waiting"], counters["kv_blocks_used"]) == (0, 0, 0)
