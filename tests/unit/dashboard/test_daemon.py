"""The dashboard of a real daemon: what an open one means for its end, and that a reload takes it away."""

import json
import time
from pathlib import Path

import aiohttp
import pytest

from tests.support.daemon import started
from tests.support.dashboard import messages_of

pytestmark = pytest.mark.real_loop


async def test_a_page_that_is_open_holds_up_neither_reload_nor_end(tmp_path: Path) -> None:
    async with started(tmp_path, ready=True, engine="fake") as daemon:
        url = (await daemon.ask("/status"))["api_url"].removesuffix("/v1")
        async with aiohttp.ClientSession(url) as session:
            async with session.get("/") as page:
                assert page.status == 200
            async with session.get("/dashboard/stream") as stream:
                messages = messages_of(stream)
                assert [(await anext(messages))[0] for _ in range(2)] == ["rights", "hello"]
                code, out, err = await daemon.flexctl("rebalance", "--stages", "4", "--wait")
                assert code == 0, out + err
                began_s = time.monotonic()
                daemon.process.terminate()
                told = [(topic, data) async for topic, data in messages]
                await daemon.ended()
                assert time.monotonic() - began_s < 10.0  # streams of requests would have 30 s
    assert told[-1] == ("bye", {"reason": "the daemon ends"})
    events = [data["message"] for topic, data in told if topic == "event"]
    assert [events[0], events[-1]] == ["plan: 2 -> 4 stages", "draining: streams in flight are finishing"]
    assert len([data for topic, data in told if topic == "status"][-1]["stages"]) == 4


async def test_a_reload_takes_it_away_and_brings_it_back(tmp_path: Path) -> None:
    async with started(tmp_path, ready=True, engine="fake") as daemon:
        url = (await daemon.ask("/status"))["api_url"].removesuffix("/v1")
        text = daemon.config.read_text()
        async with aiohttp.ClientSession(url) as session:
            for line, status in (('http.dashboard = "off"\n', 404), ("", 200)):
                daemon.config.write_text(text + line)
                code, out, err = await daemon.flexctl("--json", "reload")
                assert code == 0, out + err
                assert [each["key"] for each in json.loads(out)["changes"]] == ["http.dashboard"]
                async with session.get("/") as page:
                    assert page.status == status
