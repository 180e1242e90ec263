"""What an ingress has under way at the daemon: questions that wait for an answer, and streams."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from engines.protocol import GenerationRequest, TokenChunk
from flexpiped.api.errors import ApiError, unavailable
from flexpiped.ingress.messages import (
    Admit,
    AwaitDeath,
    Board,
    Boarded,
    Chunk,
    Done,
    End,
    Generate,
    Refused,
    Reserve,
    Tokens,
    Up,
    is_last,
)

Question = Admit | Reserve | Board | AwaitDeath
Answer = Done | Boarded


class Link:
    """The ingress's side. Used on one event loop. ``send`` is given what goes to the daemon, in order."""

    def __init__(self, send: Callable[[Up], None]) -> None:
        self.send = send
        self._next_id = 0
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._streams: dict[int, _Stream] = {}
        self._end: ApiError | None = None

    @property
    def num_open(self) -> int:
        """Questions and streams that are not finished."""
        return len(self._waiting) + len(self._streams)

    def new_id(self) -> int:
        """Return a name for the next thing under way."""
        self._next_id += 1
        return self._next_id

    async def ask(self, question: Question) -> Answer:
        """Return the answer. Leaving the wait ends the question.

        Raises:
            ApiError: The daemon refuses, or is gone.
        """
        self._ensure_there()
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[question.id] = answer
        self.send(question)
        try:
            return await answer
        except asyncio.CancelledError:
            self.send(End(question.id))
            raise
        finally:
            self._waiting.pop(question.id, None)

    async def generate(self, model: str, serial: int, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Continue a prompt as ``Engine.generate`` does; closing the iterator aborts it.

        Raises:
            ApiError: At any time: what ``from_engine_error`` makes of an error of the engine.
        """
        self._ensure_there()
        number, stream = self.new_id(), _Stream()
        self._streams[number] = stream
        self.send(Generate(number, model, serial, request))
        is_over = False
        try:
            while not is_over:
                chunk = await stream.next()
                is_over = is_last(chunk)
                yield chunk
        except ApiError:
            is_over = True
            raise
        finally:
            del self._streams[number]
            if not is_over:
                self.send(End(number))

    def take(self, message: Answer | Refused | Tokens | Chunk) -> None:
        """Take what the daemon says. What nobody waits for any more is dropped."""
        match message:
            case Tokens(id=number, token_ids=token_ids):
                if (stream := self._streams.get(number)) is not None:
                    stream.put(TokenChunk(token_ids=token_ids))
            case Chunk(id=number, chunk=chunk):
                if (stream := self._streams.get(number)) is not None:
                    stream.put(chunk)
            case Refused(id=number):
                self._refuse(number, message.error)
            case Done(id=number) | Boarded(id=number):
                if (answer := self._waiting.get(number)) is not None and not answer.done():
                    answer.set_result(message)

    def lose(self, reason: str) -> None:
        """The daemon is gone: whatever is under way ends with an error."""
        self._end = unavailable(f"the daemon is gone: {reason}", code="shutting_down")
        for number in (*self._waiting, *self._streams):
            self._refuse(number, self._end)

    def _refuse(self, number: int, error: ApiError) -> None:
        if (stream := self._streams.get(number)) is not None:
            stream.put(error)
        elif (answer := self._waiting.get(number)) is not None and not answer.done():
            answer.set_exception(error)

    def _ensure_there(self) -> None:
        if self._end is not None:
            raise self._end


class _Stream:
    """What has come of a stream and was not taken."""

    def __init__(self) -> None:
        self._waiting: deque[TokenChunk | ApiError] = deque()
        self._news: asyncio.Future[None] | None = None

    def put(self, item: TokenChunk | ApiError) -> None:
        self._waiting.append(item)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def next(self) -> TokenChunk:
        """Raises: ApiError."""
        while not self._waiting:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        item = self._waiting.popleft()
        if isinstance(item, ApiError):
            raise item
        return item
