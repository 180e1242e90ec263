"""A real second process takes the memory of the host: the KV cache of a real daemon shrinks, and grows again."""

import asyncio
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.daemon import Daemon, started
from tests.support.memory_taker import taking_all_but
from topology.host_memory import free_host_memory
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


async def test_another_tenant_takes_the_memory_and_frees_it_and_no_request_notices(tmp_path: Path) -> None:
    here = free_host_memory()
    assert here is not None
    keep_free = here.free_bytes - DAEMON_BYTES - ROOM_BYTES
    more = f"devices.cpu_count = 2\ndevices.keep_free = {keep_free}\ndevices.grow_after_s = 0.0\n"
    body: dict[str, Any] = {"prompt": "Once upon", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    async with (
        started(tmp_path, ready=True, engine="native", stages=2, more=more) as daemon,
        aiohttp.ClientSession() as http,
    ):
        url = (await daemon.ask("/status"))["api_url"]

        async def text() -> str:
            async with http.post(f"{url}/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                return str((await answer.json())["choices"][0]["text"])

        most, before = await kv_blocks(daemon), await text()
        streams = [asyncio.create_task(text()) for _ in range(3)]
        with taking_all_but(keep_free - 256 * MIB):
            least = await when_kv_blocks(daemon, below=most // 2)
        assert await when_kv_blocks(daemon, above=most - 1) == most
        assert [await each for each in streams] == [before] * 3
        _, shown, _ = await daemon.flexctl("history", "--kind", "devices")
        assert re.search(rf"replica 1: KV cache shrinks from \d+ to {least} KV blocks: .* are free on ", shown), shown
        assert re.search(rf"replica 1: KV cache grows from \d+ to {most} KV blocks: .* are free on ", shown), shown
