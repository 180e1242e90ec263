"""The engine changes from native to vLLM and back while requests stream over HTTP: greedy text in fp32 stays.

In between vLLM's layers move, as a new user would have them moved.
"""

import asyncio
import re
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.support.daemon import rebalanced_to_its_plan, run_until_exit, started, write_config
from tests.support.engine_change import PROMPTS, TAKEN, Client, changed
from tests.support.vllm import interpreter

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop]


async def test_streams_do_not_notice_which_engine_serves_them(tmp_path: Path) -> None:
    more = f'dtype = "float32"\n[engines.vllm]\npython = "{interpreter()}"\nkv_cache = "32 MiB"\n'
    async with (
        started(tmp_path, ready=True, engine="native", stages=3, more=more) as daemon,
        aiohttp.ClientSession() as session,
    ):
        url = (await daemon.ask("/status"))["api_url"]
        client = Client(session, url)
        expected = {prompt: (await client.complete(prompt))[1] for prompt in PROMPTS}
        assert (await client.complete("Once", min_p=0.1))[0] == 400  # vLLM's own parameter

        async with client.busy(expected):
            assert re.fullmatch(TAKEN, await changed(daemon, "vllm", stages=3))
        assert (await client.complete("Once", min_p=0.1))[0] == 200

        async with client.busy(expected):  # plans for vLLM's ranks are what vLLM runs then
            assert await rebalanced_to_its_plan(daemon, "--stages", "2") == 2
            assert await rebalanced_to_its_plan(daemon) == 2
        await assert_second_daemons_are_told_off(tmp_path, url, more)

        async with client.busy(expected):
            with_min_p = asyncio.create_task(client.until_refused("Once", min_p=0.1, max_tokens=2000))
            message = await changed(daemon, "native")
        assert re.fullmatch(f"{TAKEN}, 1 more finished at the first", message)
        texts = await with_min_p
        assert {text[: len(expected["Once"])] for text in texts} == {expected["Once"]}
        assert (await client.complete("Once", min_p=0.1))[0] == 400


async def assert_second_daemons_are_told_off(folder: Path, url: str, more: str) -> None:
    """On the port of the first, or with too little memory: before a second vLLM is started."""
    second = folder / "second"
    second.mkdir()
    port = urlsplit(url).port
    assert port is not None
    small = f'devices.cpu_memory = "2 MiB"\n{more}'
    for config, reason in (
        ({"port": port, "more": more}, f"cannot listen on 127.0.0.1:{port}: Address already in use"),
        ({"more": small}, "needs"),
    ):
        code, log = await run_until_exit(write_config(second, engine="vllm", **config))
        assert (code, reason in log, "starting vLLM" in log) == (1, True, False), log
