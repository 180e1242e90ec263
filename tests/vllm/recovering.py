"""Streams that go on when their vLLM is replaced, through the supervisor."""

import asyncio

from engines.closing import closing
from flexpiped.supervisor import Supervisor
from tests.vllm.copied import ENDLESS
from tests.vllm.streams import Result, stream


class Streams:
    """Streams through the supervisor. ``stop`` ends each at its next token."""

    def __init__(self, supervisor: Supervisor, *, count: int) -> None:
        self._supervisor = supervisor
        self._stopped = False
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.tokens: list[list[int]] = [[] for _ in range(count)]

    async def begin(self, max_tokens: int = ENDLESS) -> None:
        """Start all and return when each has a token."""
        begun = [asyncio.Event() for _ in self.tokens]
        self._tasks = [asyncio.create_task(self._read(index, max_tokens, event)) for index, event in enumerate(begun)]
        await asyncio.gather(*(event.wait() for event in begun))

    async def _read(self, index: int, max_tokens: int, begun: asyncio.Event) -> None:
        async with closing(self._supervisor.generate(stream(index, max_tokens=max_tokens))) as chunks:
            async for chunk in chunks:
                self.tokens[index] += chunk.token_ids
                begun.set()
                self._news.set()
                if self._stopped:
                    return

    async def gain(self, count: int) -> None:
        """Return when each has got so many tokens more."""
        wanted = [len(tokens) + count for tokens in self.tokens]
        while any(len(tokens) < enough for tokens, enough in zip(self.tokens, wanted, strict=True)):
            self._news.clear()
            await self._news.wait()

    async def stop(self) -> None:
        self._stopped = True
        await self.end()

    async def end(self) -> None:
        await asyncio.gather(*self._tasks)

    def assert_begin_of(self, expected: Result) -> None:
        assert self.tokens == [tokens[: len(got)] for got, (tokens, _) in zip(self.tokens, expected, strict=True)]
