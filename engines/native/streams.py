"""The tokens of requests on the daemon's side: what has arrived for each, and was not taken yet."""

import asyncio

from engines.errors import EngineError, InvalidRequest
from engines.native import client_messages as c
from engines.protocol import FinishReason, ScoredToken, TokenChunk, TopLogprobs


class Stream:
    """Of one request."""

    __slots__ = ("_cached", "_logprobs", "_prompt", "_tops", "_waiter", "error", "finish", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.error: EngineError | None = None
        self._logprobs: list[float] = []
        self._tops: list[TopLogprobs] = []
        self._prompt: tuple[ScoredToken, ...] = ()
        self._cached: int | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> TokenChunk:
        """Return what has arrived, once; wait if that is nothing. It may be that it was an error that arrived."""
        if not (self.tokens or self.finish is not None or self.error is not None):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        chunk = TokenChunk(
            token_ids=tuple(self.tokens),
            logprobs=tuple(self._logprobs),
            finish_reason=self.finish,
            top_logprobs=tuple(self._tops),
            prompt_logprobs=self._prompt,
            cached_tokens=self._cached,
        )
        self.tokens, self._logprobs, self._tops, self._prompt, self._cached = [], [], [], (), None
        return chunk

    def add(self, token: int, finish: str, logprob: float | None, details: c.Details | None) -> None:
        """Take in what one step brought; ``token`` -1: none."""
        if token >= 0:
            self.tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if details is not None:
            self._add_details(details)
        if finish:
            self.finish = FinishReason(finish)
        self._wake()

    def end(self, error: EngineError) -> None:
        """Nothing more will come."""
        self.error = error
        self._wake()

    def _add_details(self, details: c.Details) -> None:
        if details.top:
            self._tops.append(details.top)
        if details.prompt:
            self._prompt = details.prompt
        if details.cached is not None:
            self._cached = details.cached

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Streams:
    """Of all requests under way, by their keys. What comes for others, which were aborted meanwhile, is dropped."""

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, key: int) -> Stream:
        """Begin with a request."""
        self._streams[key] = Stream()
        return self._streams[key]

    def close(self, key: int) -> None:
        """Nobody takes anything of this request any more."""
        del self._streams[key]

    def deliver(self, outputs: c.Outputs) -> None:
        """Take in what one step brought all requests."""
        for index, (key, token, finish, logprob) in enumerate(
            zip(outputs.keys, outputs.tokens, outputs.finishes, outputs.logprobs, strict=True)
        ):
            stream = self._streams.get(key)
            if stream is not None:
                stream.add(token, finish, logprob, outputs.details.get(index))

    def refuse(self, refused: c.Refused) -> None:
        """Take in that a request cannot be run."""
        stream = self._streams.get(refused.key)
        if stream is not None:
            stream.end(InvalidRequest(refused.message, parameter=refused.parameter, code=refused.code))

    def end(self, error: EngineError) -> None:
        """Nothing more will come for any of them."""
        for stream in self._streams.values():
            stream.end(error)
