"""Two native replicas of different granularity serve at the same time: they come, die and leave under streams."""

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from engines.native.adapter import NativeEngine
from flexpiped.config_file import load_config
from flexpiped.events import Event, EventKind
from flexpiped.intent import Intent, basis_of
from flexpiped.journal import journal_of
from flexpiped.replica import ReplicaState
from flexpiped.replicas import Replicas
from flexpiped.supervisor import Supervisor
from tests.native.test_replica import STREAMS, Made, Streams, stream
from tests.support.daemon import completed, started, write_config
from tests.support.native import collect, layout
from tests.support.until import until

pytestmark = [pytest.mark.engine, pytest.mark.real_loop]


@pytest.fixture
async def replicas() -> AsyncIterator[Replicas]:
    replicas = Replicas(make=Supervisor)
    yield replicas
    await replicas.close()


async def test_streams_are_token_exact_while_replicas_come_die_and_leave(replicas: Replicas) -> None:
    made = Made()
    first = await replicas.add(layout(4, devices=("cpu:0", "cpu:1")), factory=made)
    expected = [(await collect(made.engines[0], stream(index)))[0] for index in range(STREAMS)]
    streams = Streams(replicas, STREAMS)
    await streams.begin()

    second = await replicas.add(layout(devices=("cpu:2",)), factory=made)
    assert [each.supervisor.pipeline.granularity for each in replicas.all] == [2, 1]
    await until(lambda: len(replicas.flights.at(made.engines[1])) >= 2, timeout_s=60.0)

    at_second = replicas.flights.at(made.engines[1])
    os.kill(made.engines[1].core_pid, signal.SIGKILL)
    await until(lambda: all(each.engine is not made.engines[1] for each in at_second))
    assert first.engine is made.engines[0]
    again = await second.supervisor.ready_engine(other_than=made.engines[1])
    assert again is made.engines[2]
    await until(lambda: len(replicas.flights.at(made.engines[2])) >= 2, timeout_s=60.0)

    await replicas.remove(first, drain_deadline_s=0.05)
    assert (replicas.all, second.state) == ((second,), ReplicaState.SERVING)
    await streams.end()
    assert len(streams.whole) >= STREAMS
    assert all(tokens == expected[index] for index, tokens in streams.whole)
    assert isinstance(second.engine, NativeEngine)
    assert (await second.engine.counters()).kv_blocks_used == 0


async def test_the_daemon_scales_as_flexctl_asks_and_loses_no_request(tmp_path: Path) -> None:
    body = {"prompt": "Once upon", "max_tokens": 64, "temperature": 0, "ignore_eos": True}
    async with (
        started(tmp_path, ready=True, engine="native", stages=2, more="devices.cpu_count = 3\n") as daemon,
        aiohttp.ClientSession() as http,
    ):
        url = (await daemon.ask("/status"))["api_url"]

        async def text() -> str:
            return await completed(http, url, body)

        over = asyncio.Event()
        before, texts = await text(), set()

        async def ask() -> None:
            while not over.is_set():
                texts.add(await text())

        async with asyncio.TaskGroup() as asking:
            for _ in range(3):
                asking.create_task(ask())
            code, out, err = await daemon.flexctl("scale", "--replicas", "2", "--stages", "1", "--wait")
            assert code == 0, out + err
            assert "plan     1 -> 2 replicas: a replica of 1 stage on cpu:2 comes" in out
            assert re.search(r"done in .* s: 2 replicas serve: 1 of 2 stages, 2 of 1 stage\n", out), out
            code, out, err = await daemon.flexctl("scale", "--replicas", "3", "--stages", "1")
            assert (code, err) == (
                4,
                "refused: no room for replica 3: no device is left (cpu:0, cpu:1, cpu:2 are taken)\n",
            )
            _code, out, _err = await daemon.flexctl("status")
            assert re.search(r"^demo-model   native   2 replicas .* ready, up", out, re.MULTILINE), out
            assert re.search(r"^  replica 1   serving   epoch 0   2 stages   \d requests?$", out, re.MULTILINE), out
            assert re.search(r"^  replica 2   serving   epoch 0   1 stage   \d requests?$", out, re.MULTILINE), out
            second = (await daemon.ask("/status"))["replicas"][1]
            os.kill(second["stages"][0]["workers"][0]["pid"], signal.SIGKILL)
            await asyncio.sleep(0)
            code, out, err = await daemon.flexctl("scale", "--replicas", "1", "--on", "1", "--wait")
            over.set()
            assert code == 0, out + err
        assert texts == {before}
        assert (await text()) == before
        status = await daemon.ask("/status")
        assert [(each["number"], len(each["stages"])) for each in status["replicas"]] == [(2, 1)]
        assert status["last_handover"]["what"] == "2 -> 1 replicas"


async def test_a_start_brings_back_all_replicas_that_were_asked_for(tmp_path: Path) -> None:
    more = f'devices.cpu_count = 2\njournal.file = "{tmp_path / "journal.db"}"\n'
    settings = load_config(write_config(tmp_path, engine="native", stages=1, more=more))
    intent = Intent(
        engine="native",
        pipelines=(layout(devices=("cpu:1",)), layout(devices=("cpu:0",))),
        basis=basis_of(settings),
        reason="asked for by a test",
        since_unix_s=1.0,
    )
    journal = journal_of(
        settings.journal, environment={}, instance=str(tmp_path / "admin.sock"), on_failure=pytest.fail
    )
    await asyncio.to_thread(journal.open)
    journal.record(Event(sequence=1, time_unix_s=time.time(), kind=EventKind.REFACTORING, message="plan"), intent)
    await asyncio.to_thread(journal.close)

    body = {"prompt": "Once upon", "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    async with (
        started(tmp_path, ready=True, engine="native", stages=1, more=more) as daemon,
        aiohttp.ClientSession() as http,
    ):
        replicas = await daemon.replicas_serving(2)
        assert [each["stages"][0]["device_ids"] for each in replicas] == [["cpu:1"], ["cpu:0"]]
        url = (await daemon.ask("/status"))["api_url"]

        assert len(set(await asyncio.gather(*(completed(http, url, body) for _ in range(4))))) == 1
        steps = [each["engine_counters"] for each in (await daemon.ask("/status"))["replicas"]]
        assert all(each["generated_tokens_total"] > 0 for each in steps)
