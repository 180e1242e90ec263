"""A real second process takes memory: the KV cache of the native engine shrinks, and grows when that is gone."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engines.process import memory_pss_bytes
from flexpiped.events import EventLog
from flexpiped.neighbourhood import Neighbourhood
from flexpiped.refactoring import Refactorings
from flexpiped.replicas import Replicas
from flexpiped.supervisor import Supervisor
from planner.neighbourhood import NeighbourConstants, Verb
from tests.native.test_replica import Made, stream
from tests.support.daemon import Daemon, completed, started
from tests.support.layouts import EvenResolver
from tests.support.memory_taker import taking_all_but
from tests.support.native import collect, layout
from topology.device import cpu_devices
from topology.host_memory import FreeMemory, free_host_memory
from topology.units import GIB, MIB

pytestmark = [pytest.mark.engine, pytest.mark.real_loop]

DAEMON_BYTES = GIB  # what the daemon and its engine take, and some
ROOM_BYTES = 512 * MIB  # what is left then besides what is to stay free: eight times its KV cache


async def kv_blocks(daemon: Daemon) -> int:
    return int((await daemon.ask("/status"))["engine_counters"]["kv_blocks_capacity"])


async def when_kv_blocks(daemon: Daemon, *, below: int = 1 << 30, above: int = 0) -> int:
    """Return the number of KV blocks once it is between the two."""
    async with asyncio.timeout(60.0):
        while True:
            if above < (blocks := await kv_blocks(daemon)) < below:
                return blocks
            await asyncio.sleep(0.05)


@asynccontextmanager
async def holding(num_bytes: int) -> AsyncIterator[int]:
    """Have a process hold so much memory; its id."""
    code = f"held = b'\\1' * {num_bytes}; print('there', flush=True); input()"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    yield process.pid
    process.kill()
    await process.wait()


async def test_an_engine_follows_what_a_second_process_takes_by_the_kernels_count() -> None:
    """Of a budget that only this test has, so that others on the machine do not matter."""
    made, tenants, now_s = Made(), list[int](), [0.0]
    replicas = Replicas(make=Supervisor)
    try:
        await replicas.add(layout(4, devices=("cpu:0", "cpu:1")), factory=made)
        engine = made.engines[0]
        bounds, counters = engine.capabilities.kv_range, await engine.counters()
        assert bounds is not None
        neighbourhood = Neighbourhood(
            NeighbourConstants(keep_free_bytes=100 * MIB, grow_after_s=30.0),
            replicas=lambda: replicas.all,
            kv_bytes_per_token=lambda: 16 * MIB // (counters.kv_blocks_capacity * counters.kv_block_tokens),
            devices=lambda: cpu_devices(count=2, memory_bytes=GIB),
            refactorings=Refactorings(engine=lambda: engine, resolver=EvenResolver, events=EventLog()),
            events=EventLog(),
            host=lambda: FreeMemory(
                free_bytes=300 * MIB - sum(memory_pss_bytes(pid) or 0 for pid in tenants), bound="the budget"
            ),
            clock=lambda: now_s[0],
        )
        expected = await collect(engine, stream(0))
        assert await neighbourhood.look() == ()
        async with holding(256 * MIB) as pid:
            tenants.append(pid)
            streaming = asyncio.create_task(collect(engine, stream(0)))
            [shrink] = await neighbourhood.look()
            assert (shrink.verb, shrink.blocks) == (Verb.SHRINK, bounds.least_blocks)
            assert (await engine.counters()).kv_blocks_capacity == bounds.least_blocks
        assert await neighbourhood.look() == ()  # it has gone, but that must last
        now_s[0] = 30.0
        [grow] = await neighbourhood.look()
        assert (grow.verb, grow.blocks) == (Verb.GROW, bounds.most_blocks)
        assert (await streaming)[0] == expected[0]
    finally:
        await replicas.close()


@pytest.mark.long  # it is the host's memory that it watches: who else takes or frees some disturbs it
async def test_another_tenant_takes_the_memory_and_frees_it_and_no_request_notices(tmp_path: Path) -> None:
    here = free_host_memory()
    assert here is not None
    keep_free = here.free_bytes - DAEMON_BYTES - ROOM_BYTES
    more = f"devices.cpu_count = 2\ndevices.keep_free = {keep_free}\ndevices.grow_after_s = 0.0\n"
    body: dict[str, Any] = {"prompt": "Once upon", "max_tokens": 160, "temperature": 0, "ignore_eos": True}
    async with (
        started(tmp_path, ready=True, engine="native", stages=2, more=more) as daemon,
        aiohttp.ClientSession() as http,
    ):
        url = (await daemon.ask("/status"))["api_url"]

        async def text() -> str:
            return await completed(http, url, body)

        most, before = await kv_blocks(daemon), await text()
        streams = [asyncio.create_task(text()) for _ in range(3)]
        with taking_all_but(keep_free - 256 * MIB):
            least = await when_kv_blocks(daemon, below=most // 2)
        assert await when_kv_blocks(daemon, above=most - 1) == most
        assert [await each for each in streams] == [before] * 3
        _, shown, _ = await daemon.flexctl("history", "--kind", "devices")
        assert re.search(rf"replica 1: KV cache shrinks from \d+ to {least} KV blocks: .* are free on ", shown), shown
        assert re.search(rf"replica 1: KV cache grows from \d+ to {most} KV blocks: .* are free on ", shown), shown
