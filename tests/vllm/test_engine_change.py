"""The engine changes from native to vLLM and back while requests stream over HTTP: greedy text in fp32 stays.

In between vLLM's layers move, as a new user would have them moved. Two ingress processes answer the clients;
``tests/sglang/test_engine_change.py`` has a daemon that does so itself.
"""

import asyncio
import re
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.support.daemon import rebalanced_to_its_plan, run_until_exit, started, write_config
from tests.support.engine_change import PROMPTS, TAKEN, Client, changed
from tests.support.secrets import DEBUG, assert_not_logged
from tests.support.vllm import interpreter

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop]

LONG = 430  # tokens: not a multiple of what others have, so that they do not end together
ANY_TEXT = {"regex": r"[\s\S]*"}


async def test_streams_do_not_notice_which_engine_serves_them(tmp_path: Path) -> None:
    own = f'[engines.vllm]\npython = "{interpreter()}"\nkv_cache = "32 MiB"\n'
    more = f'dtype = "float32"\nhttp.ingress_processes = 2\n{DEBUG}{own}'
    async with (
        started(tmp_path, ready=True, engine="native", stages=2, more=more) as daemon,
        aiohttp.ClientSession() as session,
    ):
        url = (await daemon.ask("/status"))["api_url"]
        client = Client(session, url)
        expected, (_, longest) = await asyncio.gather(client.texts(), client.complete("Once", max_tokens=LONG))
        short, long = {"Once": expected["Once"]}, {"Once": longest}

        # That output keeps to a grammar is for vLLM's own server alone, so such requests end where they are.
        async with (
            client.busy(expected),
            client.busy(short, structured_outputs=ANY_TEXT),
            client.busy(long, max_tokens=LONG, structured_outputs=ANY_TEXT),
        ):
            message = await changed(daemon, "vllm", stages=2)
        assert re.fullmatch(f"{TAKEN}, [12] more finished at the first", message)

        async with client.busy(expected):  # plans for vLLM's ranks are what vLLM runs then
            assert await rebalanced_to_its_plan(daemon, "--stages", "1") == 1
            best = await rebalanced_to_its_plan(daemon)
        await assert_second_daemons_are_told_off(tmp_path, url, more)

        async with client.busy(expected), client.busy(long, max_tokens=LONG, min_p=0.1):  # which both engines know
            assert re.fullmatch(TAKEN, await changed(daemon, "native", stages=best))
        assert_not_logged(daemon, PROMPTS[1], *expected.values(), longest)


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
