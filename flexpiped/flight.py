"""One request on its way through engines: at one engine at a time, and off it at any moment.

The request's reader calls ``board``, ``next_chunk`` and ``leave``; whoever hands requests over calls ``take_off``. All
of it on one event loop. A reader that waits is interrupted as ``asyncio.timeout`` does it: its task is cancelled, and
the count of cancellations tells this one from its own (a client that leaves). A timeout for each token would do the
same, but costs 3 us a token.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from typing import Final

from engines.errors import EngineError
from engines.offers import KvParcel
from engines.protocol import Engine, GenerationRequest, SamplingParams, TokenChunk
from planner.routing import NEWEST

_OUTPUT_TOKENS: Final = 128.0  # of a request, before one has ended


class TakenOff(Exception):
    """The request was taken off its engine: it goes on at the one in force."""


class _Place(Enum):
    AWAY = "at no engine"
    WAITING = "the reader waits for the engine"
    PARKED = "at an engine, while the reader does something else"
    LEAVING = "the engine is told to forget it"


class Flight:
    """One request from its first engine to its last. ``num_tokens`` counts prompt and generated tokens.

    ``prefill_tokens`` are those of them that its engine has still to compute before the next one, ``output_tokens`` how
    many may still come. ``sampling``: what it asks for, which only some kinds of engine may know. ``destination``: the
    engine that it is to board next, of those in force.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.num_tokens = 0
        self.prefill_tokens = 0
        self.output_tokens = 0
        self.generated_tokens = 0
        self.sampling: SamplingParams | None = None
        self.destination: Engine | None = None
        self.engine: Engine | None = None  # None: at no engine
        self.has_ended = False
        self.kv: KvParcel | None = None  # for the next engine, which has accepted it
        self._chunks: AsyncGenerator[TokenChunk, None] | None = None
        self._place = _Place.AWAY
        self._is_taken = False
        self._reader: asyncio.Task[object] | None = None  # while it waits
        self._is_interrupted = False
        self._left = asyncio.Event()
        self._news: asyncio.Event | None = None  # set at the next chunk or the end, while somebody wants to know

    # --- the reader's side ---

    def board(self, engine: Engine, request: GenerationRequest) -> None:
        """Begin at an engine, with the KV cache that is there for it; ``next_chunk`` must follow at once."""
        request, self.kv = replace(request, kv=self.kv), None
        self.engine, self.destination = engine, None
        self.sampling = request.sampling
        self.num_tokens = len(request.prompt_token_ids) + len(request.generated_token_ids)
        self.prefill_tokens = self.num_tokens - (0 if request.kv is None else request.kv.num_tokens)
        self.output_tokens = request.sampling.max_tokens - len(request.generated_token_ids)
        chunks = engine.generate(request)
        if not isinstance(chunks, AsyncGenerator):
            raise TypeError(f"{type(chunks).__name__} has no aclose, as the Engine protocol promises")
        self._chunks = chunks
        self._place, self._is_taken = _Place.PARKED, False
        self._left.clear()

    async def next_chunk(self) -> TokenChunk:
        """Return what the engine gives next.

        Raises:
            TakenOff: ``leave``, and board the engine in force.
            EngineError: As the engine's iterator, or it ended without a last chunk.
        """
        if self._is_taken:
            raise TakenOff
        assert self._chunks is not None, "board comes first"
        self._reader = reader = asyncio.current_task()
        assert reader is not None, "requests are read by tasks"
        cancellations = reader.cancelling()
        self._place, self._is_interrupted = _Place.WAITING, False
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            raise EngineError("the engine ended a request without a reason") from None
        except asyncio.CancelledError:
            if self._is_interrupted and reader.cancelling() - 1 <= cancellations:
                raise TakenOff from None
            raise
        finally:
            self._place, self._reader = _Place.PARKED, None
            if self._is_interrupted:
                reader.uncancel()
        self.num_tokens += len(chunk.token_ids)
        self.output_tokens -= len(chunk.token_ids)
        self.generated_tokens += len(chunk.token_ids)
        self.prefill_tokens = 0
        if self._news is not None:
            self._news.set()
        if self._is_taken:  # the engine gave it all the same; it need not wait for the reader's next call
            await self.leave()
        return chunk

    async def leave(self) -> None:
        """Have the engine forget the request; return when it has. Idempotent."""
        if self._place is _Place.LEAVING:
            await self._left.wait()
        elif self._place is not _Place.AWAY:
            assert self._chunks is not None
            self._place = _Place.LEAVING
            try:
                await self._chunks.aclose()
            finally:
                self._place, self.engine, self._chunks = _Place.AWAY, None, None
                self._left.set()

    def end(self) -> None:
        """Nothing more will come of this request."""
        self.has_ended = True
        if self._news is not None:
            self._news.set()

    # --- the side of whoever hands requests over ---

    async def take_off(self) -> bool:
        """Take the request off its engine and return when that has forgotten it.

        True: the reader waits for tokens, so it boards the engine in force by itself and at once. False: it is busy
        elsewhere (a client that reads slowly) or ends, and boards when it comes back.
        """
        if self._place is _Place.AWAY:
            return False
        self._is_taken = True
        if self._place is not _Place.WAITING:
            await self.leave()
            return False
        assert self._reader is not None
        if not self._is_interrupted:
            self._news, self._is_interrupted = asyncio.Event(), True
            self._reader.cancel()
        await self._left.wait()
        return True

    async def goes_on(self) -> None:
        """Return when the next chunk has come, wherever from, or the request has ended."""
        if self._news is not None:
            await self._news.wait()


class Flights:
    """The requests under way, in the order in which they came; those that wait for an engine included.

    ``output_tokens_mean``: what those that ended have got of late: what to expect of one that only has a limit.
    """

    def __init__(self) -> None:
        self._all: dict[Flight, None] = {}
        self.output_tokens_mean = _OUTPUT_TOKENS
        self._ended = asyncio.Event()  # replaced whenever a request ends

    def __len__(self) -> int:
        return len(self._all)

    @contextmanager
    def begin(self, request_id: str) -> Iterator[Flight]:
        """Return the scope of one request."""
        flight = Flight(request_id)
        self._all[flight] = None
        try:
            yield flight
        finally:
            del self._all[flight]
            self.output_tokens_mean += NEWEST * (flight.generated_tokens - self.output_tokens_mean)
            flight.end()
            ended, self._ended = self._ended, asyncio.Event()
            ended.set()

    def with_adapter(self, name: str) -> int:
        """Return how many requests are for the LoRA adapter of that name."""
        return sum(flight.sampling is not None and flight.sampling.adapter == name for flight in self._all)

    async def without_adapter(self, name: str) -> None:
        """Return once no request is for that adapter any more."""
        while self.with_adapter(name):
            await self._ended.wait()

    def at(self, engine: Engine) -> tuple[Flight, ...]:
        """Return the requests at ``engine``, oldest first."""
        return tuple(flight for flight in self._all if flight.engine is engine)
