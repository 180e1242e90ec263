"""The engine changes from native to vLLM and back while requests stream over HTTP: greedy text in fp32 stays."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.daemon import Daemon, rebalanced_to_its_plan, started
from tests.support.vllm import interpreter

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop]

PROMPTS = ("Once", "Question: What is 3 + 4?", "A small dog", "The old man said")
TOKENS = 250
TAKEN = r"the second instance serves, ([1-9]\d*) of \1 requests? taken over: \1 computed again"


class Client:
    """Asks for greedy completions over HTTP."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def complete(self, prompt: str, **more: Any) -> tuple[int, str]:
        """Return the status and the text of a stream; of a refusal its message."""
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True, **more}
        async with self._session.post(f"{self._url}/completions", json=body) as answer:
            if answer.status != 200:
                return answer.status, (await answer.json())["error"]["message"]
            lines = [line.decode().strip().removeprefix("data: ") async for line in answer.content]
        events = [json.loads(line) for line in lines if line not in ("", "[DONE]")]
        choices = [event["choices"][0] for event in events]
        assert choices[-1]["finish_reason"] == "length"
        return answer.status, "".join(choice["text"] for choice in choices)

    async def until_refused(self, prompt: str, **more: Any) -> list[str]:
        """Ask again and again until the answer is no, so that a request is under way at any time; return the texts."""
        texts = []
        while True:
            status, text = await self.complete(prompt, **more)
            if status != 200:
                return texts
            texts.append(text)

    @asynccontextmanager
    async def busy(self, expected: dict[str, str]) -> AsyncIterator[None]:
        """Have each prompt completed again and again, always with the same text."""
        is_over = asyncio.Event()

        async def again_and_again(prompt: str) -> int:
            times = 0
            while not is_over.is_set():
                assert await self.complete(prompt) == (200, expected[prompt])
                times += 1
            return times

        tasks = [asyncio.create_task(again_and_again(prompt)) for prompt in expected]
        try:
            yield
        finally:
            is_over.set()
        assert min(await asyncio.gather(*tasks)) > 0


async def changed(daemon: Daemon, engine: str) -> str:
    """Change the engine and return what the record says."""
    code, out, err = await daemon.flexctl("rebalance", "--engine", engine, "--wait")
    assert code == 0, out + err
    assert f" -> {engine}, 2 -> 2 stages by replica: by a second instance" in out
    status = await daemon.ask("/status")
    assert (status["engine"], len(status["stages"])) == (engine, 2)
    message: str = status["last_handover"]["message"]
    return message


async def test_streams_do_not_notice_which_engine_serves_them(tmp_path: Path) -> None:
    more = f'dtype = "float32"\n[engines.vllm]\npython = "{interpreter()}"\nkv_cache = "32 MiB"\n'
    async with (
        started(tmp_path, ready=True, engine="native", more=more) as daemon,
        aiohttp.ClientSession() as session,
    ):
        client = Client(session, (await daemon.ask("/status"))["api_url"])
        expected = {prompt: (await client.complete(prompt))[1] for prompt in PROMPTS}
        assert (await client.complete("Once", min_p=0.1))[0] == 400  # vLLM's own parameter

        async with client.busy(expected):
            assert re.fullmatch(TAKEN, await changed(daemon, "vllm"))
        assert (await client.complete("Once", min_p=0.1))[0] == 200

        async with client.busy(expected):  # plans for vLLM's ranks are what vLLM runs then
            assert await rebalanced_to_its_plan(daemon, "--stages", "2") == 2
            assert await rebalanced_to_its_plan(daemon) == 2

        async with client.busy(expected):
            with_min_p = asyncio.create_task(client.until_refused("Once", min_p=0.1, max_tokens=2000))
            message = await changed(daemon, "native")
        assert re.fullmatch(f"{TAKEN}, 1 more finished at the first", message)
        texts = await with_min_p
        assert {text[: len(expected["Once"])] for text in texts} == {expected["Once"]}
        assert (await client.complete("Once", min_p=0.1))[0] == 400
