"""The native engine ends when nobody comes, and gives its memory back; the next request starts it again and waits."""

import asyncio
import re
from pathlib import Path

import aiohttp
import pytest

from tests.native.test_failures import alive
from tests.support.daemon import started

pytestmark = [pytest.mark.engine, pytest.mark.real_loop]

SLEEPY = """
devices.cpu_count = 2
auto = { mode = "on", min_replicas = 0, idle_s = 1.0, interval_s = 0.25, windows_s = [1.0, 4.0], cool_down_s = 0.1 }
"""


async def test_the_engine_ends_when_nobody_comes_and_the_next_request_wakes_it(tmp_path: Path) -> None:
    body = {"prompt": "Once upon", "max_tokens": 16, "temperature": 0}
    async with (
        started(tmp_path, ready=True, engine="native", more=SLEEPY) as daemon,
        aiohttp.ClientSession() as http,
    ):
        status = await daemon.ask("/status")
        url, workers = status["api_url"], [w["pid"] for stage in status["stages"] for w in stage["workers"]]

        async def text() -> str:
            async with http.post(f"{url}/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                return str((await answer.json())["choices"][0]["text"])

        before = await text()
        async with asyncio.timeout(30):
            while (await daemon.ask("/status"))["state"] != "asleep":  # noqa: ASYNC110  another process
                await asyncio.sleep(0.1)
        assert workers
        async with asyncio.timeout(60):
            while any(alive(pid) for pid in workers):  # noqa: ASYNC110  other processes
                await asyncio.sleep(0.1)
        async with http.get(url.removesuffix("/v1") + "/readyz") as answer:
            assert (answer.status, (await answer.json())["status"]) == (200, "asleep")
        assert await text() == before
        assert (await daemon.ask("/status"))["state"] == "ready"
        _code, out, _err = await daemon.flexctl("events")
        told = r"asleep, until a request comes: remove 1 replica of 2 stages: no request for [1-9]\d* s"
        assert re.search(told, out), out
