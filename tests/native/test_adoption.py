"""Engines that outlive the daemon: a restarted one adopts them, and no model is loaded again."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai
import pytest

from flexpiped.models import demo_model_places
from tests.native.test_failures import alive
from tests.support.adapters import make_adapter
from tests.support.adoption import end, none_left, records
from tests.support.daemon import Daemon, completed, started
from tests.support.native import llama
from tests.support.until import until

pytestmark = [pytest.mark.engine, pytest.mark.real_loop]

SURVIVE = "engines.survive_restart = true\nengines.adopt_within_s = 60.0\n"
KEPT = 'dtype = "bfloat16"\ndevices.parameter_cache = "64 MiB"\n'
HELD = ("layers", "held_bytes", "idle_layers")
BODY = {"prompt": "Once", "max_tokens": 60, "temperature": 0.8, "seed": 7}
LONG: dict[str, Any] = BODY | {"max_tokens": 400, "extra_body": {"ignore_eos": True}}


def modes(folder: Path) -> list[int]:
    return [file.stat().st_mode & 0o777 for file in folder.glob("state/engines/*/*.json")]


@asynccontextmanager
async def lasting(folder: Path, *, more: str = "", stages: int = 2, port: int = 0) -> AsyncIterator[Daemon]:
    """Start a daemon whose engines outlive it."""
    async with started(folder, ready=True, engine="native", stages=stages, port=port, more=SURVIVE + more) as daemon:
        yield daemon


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where daemons live; no engine is left of them."""
    with none_left(tmp_path):
        yield tmp_path


def family(pid: int) -> list[int]:
    """Return the process ids of a core and of its workers."""
    return [pid, *(int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


async def text_of(daemon: Daemon, **more: str) -> str:
    url = (await daemon.ask("/status"))["api_url"]
    async with aiohttp.ClientSession() as http:
        return await completed(http, url, BODY | more)


async def begin_stream(daemon: Daemon, http: aiohttp.ClientSession, **more: str) -> aiohttp.ClientResponse:
    url = (await daemon.ask("/status"))["api_url"]
    answer = await http.post(f"{url}/completions", json=BODY | {"max_tokens": 1500, "stream": True} | more)
    await answer.content.readline()
    return answer


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
async def test_the_next_daemon_goes_on_with_the_same_processes(folder: Path, number: signal.Signals) -> None:
    """An adapter that was loaded while it served is there, too, also after the engine has died.

    One that was unloaded while a stream still had it is gone with that stream.
    """
    adapter = make_adapter(folder / "adapter", of=demo_model_places()[0], seed=1, targets=("v_proj",), lora_alpha=80)
    async with lasting(folder, more=KEPT) as daemon:
        code, _, said = await daemon.flexctl("rebalance", "--stages", "4", "--wait")
        assert code == 0, said
        code, _, said = await daemon.flexctl("lora", "load", "late", str(adapter))
        assert code == 0, said
        code, _, said = await daemon.flexctl("lora", "load", "leaving", str(adapter))
        assert code == 0, said
        undisturbed, adapted = await text_of(daemon), await text_of(daemon, model="late")
        assert adapted != undisturbed
        kept = (await daemon.ask("/status"))["parameter_cache"]
        assert kept["layers"] > 0
        [record] = records(folder)
        processes = family(record["pid"])
        assert len(processes) > 4
        assert modes(folder) == [0o600]
        async with aiohttp.ClientSession() as http:
            if number is signal.SIGKILL:  # SIGTERM would wait for the stream
                await begin_stream(daemon, http)
                await begin_stream(daemon, http, model="leaving")
            code, _, said = await daemon.flexctl("lora", "unload", "leaving")
            assert code == 0, said
            await end(daemon, number)

    async with lasting(folder, more=KEPT) as daemon:
        log = daemon.output.read_text()
        assert "engine adopted" in log
        assert [each["name"] for each in (await daemon.ask("/adapters"))["adapters"]] == ["late"]
        assert "loading weights" not in log
        status = await daemon.ask("/status")
        assert family(record["pid"]) == processes
        assert (len(status["stages"]), status["epoch"]) == (4, 1)
        assert [each["pid"] for each in records(folder)] == [record["pid"]]
        counters = status["engine_counters"]
        assert (counters["running"], counters["waiting"], counters["kv_blocks_used"]) == (0, 0, 0)
        assert await text_of(daemon) == undisturbed
        assert await text_of(daemon, model="late") == adapted
        again = (await daemon.ask("/status"))["parameter_cache"]  # of this daemon, from engines that it has not started
        assert [again[name] for name in HELD] == [kept[name] for name in HELD]
        code, out, _ = await daemon.flexctl("rebalance", "--stages", "2", "--wait")
        assert (code, "done in" in out) == (0, True)
        assert await text_of(daemon) == undisturbed
        history = [event["message"] for event in (await daemon.ask("/history"))["events"]]
        assert any(message.startswith("went on with the engines of before: 4 stages") for message in history)
        os.kill(record["pid"], signal.SIGKILL)
        assert await text_of(daemon, model="late") == adapted  # by the engine that takes its place
        await end(daemon, signal.SIGINT)

    assert records(folder) == []
    await until(lambda: not any(alive(pid) for pid in processes))


async def test_a_client_that_tries_again_is_answered_by_the_adopted_engine(folder: Path) -> None:
    """Its connection breaks with the daemon, and for a while nobody listens; nothing but its own retries helps it."""
    async with lasting(folder) as daemon:
        url = (await daemon.ask("/status"))["api_url"]
        client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=20)
        expected = await client.completions.create(model="demo-model", **LONG)
        [record] = records(folder)
        asked = asyncio.create_task(client.completions.create(model="demo-model", **LONG))
        await until(lambda: runs_one(daemon))
        await end(daemon, signal.SIGKILL)
        assert not asked.done()

    async with lasting(folder, port=urlsplit(url).port or 0) as daemon, client:
        assert (await asked).choices[0].text == expected.choices[0].text
        assert "engine adopted" in daemon.output.read_text()
        assert [each["pid"] for each in records(folder)] == [record["pid"]]
        assert (await daemon.ask("/status"))["api_url"] == url
        await end(daemon, signal.SIGINT)


async def runs_one(daemon: Daemon) -> bool:
    return bool((await daemon.ask("/status"))["engine_counters"]["running"] == 1)


@pytest.mark.long
async def test_a_second_daemon_that_asks_for_something_else_ends_it(folder: Path) -> None:
    async with lasting(folder) as daemon:
        [record] = records(folder)
        processes = family(record["pid"])
        await end(daemon, signal.SIGKILL)
    assert all(alive(pid) for pid in processes)

    async with lasting(folder, more="engines.native.max_num_seqs = 8\n") as daemon:
        assert f"it was started with other options; process {record['pid']} was ended" in daemon.output.read_text()
        await until(lambda: not any(alive(pid) for pid in processes))
        [other] = records(folder)
        assert other["pid"] != record["pid"]
        await end(daemon, signal.SIGKILL)

    async with started(folder, ready=True, engine="fake") as daemon:  # and with it off, nothing is left
        assert "asks for none that outlives the daemon" in daemon.output.read_text()
        assert not alive(other["pid"])
        assert records(folder) == []


@pytest.mark.long
async def test_a_change_that_the_end_broke_off_is_rolled_back_and_the_journal_says_so(folder: Path) -> None:
    async with lasting(folder, more="handover.prepare_deadline_s = 30.0\n") as daemon:
        undisturbed = await text_of(daemon)
        [record] = records(folder)
        await stop_in_prepare(daemon, record["pid"])

    async with lasting(folder, more="handover.prepare_deadline_s = 30.0\n") as daemon:
        assert len((await daemon.ask("/status"))["stages"]) == 2
        history = await daemon.ask("/history")
        assert any("a change to 4 stages was broken off" in event["message"] for event in history["events"])
        assert len(history["intent"]["stages"]) == 2
        assert await text_of(daemon) == undisturbed
        code, _, said = await daemon.flexctl("rebalance", "--stages", "4", "--wait")
        assert code == 0, said
        assert await text_of(daemon) == undisturbed
        assert [each["pid"] for each in records(folder)] == [record["pid"]]
        await end(daemon, signal.SIGINT)


async def stop_in_prepare(daemon: Daemon, core: int) -> None:
    """Kill the daemon while a handover prepares: its workers are held until it is gone."""
    workers = family(core)[1:]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    answer = await daemon.ask("/rebalance", {"stages": 4})
    assert answer["state"] == "started"
    await end(daemon, signal.SIGKILL)
    for pid in workers:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.long
async def test_a_second_instance_that_was_still_starting_is_not_left_behind(folder: Path) -> None:
    async with lasting(folder) as daemon:
        [record] = records(folder)
        answer = await daemon.ask("/rebalance", {"stages": 1, "replica": True})
        assert answer["state"] == "started"
        await until(lambda: len(cores_of(daemon)) == 2, timeout_s=60.0)
        [second] = set(cores_of(daemon)) - {record["pid"]}
        await end(daemon, signal.SIGKILL)

    async with lasting(folder) as daemon:
        assert [each["pid"] for each in records(folder)] == [record["pid"]]
        assert len((await daemon.ask("/status"))["stages"]) == 2
        await until(lambda: not alive(second), timeout_s=60.0)
        await end(daemon, signal.SIGINT)


def cores_of(daemon: Daemon) -> list[int]:
    """Return the process ids of engine cores that a daemon has started."""
    pid = daemon.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in children if b"engines.native.core" in Path(f"/proc/{each}/cmdline").read_bytes()]


@pytest.mark.long
async def test_all_replicas_are_adopted(folder: Path) -> None:
    async with lasting(folder) as daemon:
        code, _, said = await daemon.flexctl("scale", "--replicas", "2", "--stages", "1", "--wait")
        assert code == 0, said
        before = {record["pid"] for record in records(folder)}
        await end(daemon, signal.SIGTERM)
    assert len(before) == 2

    async with lasting(folder) as daemon:
        assert [len(each["stages"]) for each in await daemon.replicas_serving(2)] == [2, 1]
        assert {record["pid"] for record in records(folder)} == before
        await end(daemon, signal.SIGINT)
    assert records(folder) == []


@pytest.mark.long
async def test_nobody_comes_so_it_ends_by_itself(folder: Path) -> None:
    more = SURVIVE.replace("60.0", "1.0")
    async with started(folder, ready=True, engine="native", more=more) as daemon:
        [record] = records(folder)
        processes = family(record["pid"])
        await end(daemon, signal.SIGKILL)
    await until(lambda: not any(alive(pid) for pid in processes), timeout_s=30.0)


@pytest.mark.long
async def test_its_socket_is_removed_so_it_ends_by_itself(folder: Path) -> None:
    """As systemd does with the run directory of a service that is stopped."""
    async with lasting(folder) as daemon:
        [record] = records(folder)
        await end(daemon, signal.SIGKILL)
    os.unlink(record["socket"])  # noqa: PTH108  nothing that could wait
    await until(lambda: not alive(record["pid"]), timeout_s=30.0)


@pytest.mark.long
async def test_each_of_several_models_is_adopted_and_one_that_is_stopped_ends(folder: Path) -> None:
    demo = demo_model_places()[0]
    tables = f'[models.one]\nmodel = "{demo}"\nstages = 2\n[models.two]\nmodel = "{llama()}"\nstages = 1\n'
    async with lasting(folder, more=tables) as daemon:
        before = {record["name"]: record["pid"] for record in records(folder)}
        await end(daemon, signal.SIGTERM)
    assert set(before) == {"one", "two"}

    async with lasting(folder, more=tables) as daemon:
        await until(lambda: {each["name"]: each["pid"] for each in records(folder)} == before, timeout_s=60.0)
        code, _, said = await daemon.flexctl("model", "stop", "two")
        assert code == 0, said
        await until(lambda: not alive(before["two"]), timeout_s=60.0)
        assert [record["name"] for record in records(folder)] == ["one"]
        await end(daemon, signal.SIGINT)
    assert not alive(before["one"])
