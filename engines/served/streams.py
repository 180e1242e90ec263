"""What has arrived for one request and was not taken yet."""

import asyncio
from collections.abc import AsyncIterator, Iterable

from engines.errors import EngineError
from engines.protocol import FinishReason, TokenChunk


class Stream:
    """Filled by one task, taken by another as chunks; tokens that came before an error are still taken."""

    __slots__ = ("_error", "_finish", "_logprobs", "_news", "_tokens")

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._finish: FinishReason | None = None
        self._error: EngineError | None = None
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._finish is not None or self._error is not None

    def add(self, tokens: Iterable[int], logprobs: Iterable[float], finish: FinishReason | None) -> None:
        """Take in tokens; ``finish`` says that they are the last."""
        self._tokens.extend(tokens)
        self._logprobs.extend(logprobs)
        self._finish = self._finish or finish
        self._news.set()

    def fail(self, error: EngineError) -> None:
        """Nothing more will come."""
        self._error = error
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[TokenChunk]:
        while True:
            await self._news.wait()
            self._news.clear()
            chunk = TokenChunk(
                token_ids=tuple(self._tokens), logprobs=tuple(self._logprobs), finish_reason=self._finish
            )
            self._tokens, self._logprobs = [], []
            if chunk.token_ids or chunk.finish_reason is not None:
                yield chunk
            if chunk.finish_reason is not None:
                return
            if self._error is not None and not self._tokens:
                raise self._error
