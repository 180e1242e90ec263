"""Streams that go on when their engine is replaced, through what serves requests."""

import asyncio
import time

from engines.closing import closing
from flexpiped.api.backend import Serving
from tests.vllm.copied import ENDLESS
from tests.vllm.streams import Result, stream


class Streams:
    """Streams through one supervised engine or several. ``stop`` ends each at its next token.

    ``gaps_s`` has the longest time from one token to the next, of each stream.
    """

    def __init__(self, serving: Serving, *, count: int) -> None:
        self._serving = serving
        self._stopped = False
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.gaps_s = [0.0] * count

    async def begin(self, max_tokens: int = ENDLESS) -> None:
        """Start all and return when each has a token."""
        self._tasks = [asyncio.create_task(self._read(index, max_tokens)) for index in range(len(self.tokens))]
        await self.gain(1)

    async def _read(self, index: int, max_tokens: int) -> None:
        before_s: float | None = None
        try:
            async with closing(self._serving.generate(stream(index, max_tokens=max_tokens))) as chunks:
                async for chunk in chunks:
                    now_s = time.monotonic()
                    if before_s is not None:
                        self.gaps_s[index] = max(self.gaps_s[index], now_s - before_s)
                    before_s = now_s
                    self.tokens[index] += chunk.token_ids
                    self._news.set()
                    if self._stopped:
                        return
        finally:
            self._news.set()

    async def gain(self, count: int) -> None:
        """Return when each has got so many tokens more; one that fails or ends before fails this."""
        wanted = [len(tokens) + count for tokens in self.tokens]
        while short := [index for index, enough in enumerate(wanted) if len(self.tokens[index]) < enough]:
            for task in (self._tasks[index] for index in short):
                if task.done():
                    task.result()
                    raise AssertionError("a stream has ended")
            self._news.clear()
            await self._news.wait()

    async def stop(self) -> None:
        self._stopped = True
        await self.end()

    async def end(self) -> None:
        await asyncio.gather(*self._tasks)

    def assert_begin_of(self, expected: Result) -> None:
        assert self.tokens == [tokens[: len(got)] for got, (tokens, _) in zip(self.tokens, expected, strict=True)]
