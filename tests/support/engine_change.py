"""What tests of a change of the engine share: clients over HTTP that stream meanwhile, and the change itself."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.support.daemon import Daemon

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
        assert "choices" in events[-1], events[-1]
        choices = [event["choices"][0] for event in events]
        assert choices[-1]["finish_reason"] == "length"
        return answer.status, "".join(choice["text"] for choice in choices)

    async def texts(self) -> dict[str, str]:
        """Return the text that each prompt gives, all of them asked for together."""
        answers = await asyncio.gather(*(self.complete(prompt) for prompt in PROMPTS))
        return {prompt: text for prompt, (_, text) in zip(PROMPTS, answers, strict=True)}

    @asynccontextmanager
    async def busy(self, expected: dict[str, str], **more: Any) -> AsyncIterator[None]:
        """Have each prompt completed again and again, always with the same text. ``more`` is in each request.

        What begins together ends together, and for a moment nothing would be under way: so their first requests
        have different lengths.
        """
        is_over = asyncio.Event()
        tokens = more.get("max_tokens", TOKENS)

        async def again_and_again(prompt: str, first: int) -> int:
            times, (status, _) = 0, await self.complete(prompt, **{**more, "max_tokens": first})
            assert status == 200
            while times == 0 or not is_over.is_set():
                assert await self.complete(prompt, **more) == (200, expected[prompt])
                times += 1
            return times

        tasks = [
            asyncio.create_task(again_and_again(prompt, tokens * place // len(expected)))
            for place, prompt in enumerate(expected, start=1)
        ]
        try:
            yield
        finally:
            is_over.set()
        assert min(await asyncio.gather(*tasks)) > 0


async def changed(daemon: Daemon, engine: str, *, stages: int = 2) -> str:
    """Change the engine of so many stages and return what the record says."""
    code, out, err = await daemon.flexctl("rebalance", "--engine", engine, "--wait")
    assert code == 0, out + err
    noun = "stage" if stages == 1 else "stages"
    assert f" -> {engine}, {stages} -> {stages} {noun} by replica: by a second instance" in out, out
    status = await daemon.ask("/status")
    assert (status["engine"], len(status["stages"])) == (engine, stages)
    message: str = status["last_handover"]["message"]
    return message
