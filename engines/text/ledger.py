"""What the text process has been asked and has answered: enough to ask a new one for exactly the rest."""

import asyncio
from dataclasses import dataclass, field

from engines.text.errors import TextError, TextProcessDied, TextRefused
from engines.text.incremental import TextDelta
from engines.text.wire import Call, Close, Decoded, Delta, Encoded, Feed, Open, Pieced, Refused, Request

Answer = Encoded | Decoded | Pieced
_CALL_ATTEMPTS = 2  # a call that was under way at two deaths is taken to be their cause


@dataclass(slots=True, eq=False)
class OpenCall:
    request: Call
    answer: asyncio.Future[Answer]
    attempts: int = 1


@dataclass(slots=True, eq=False)
class Stream:
    """``fed`` and ``characters_sent`` count what was answered; ``asked`` is the feed that is under way."""

    opened: Open
    fed: list[int] = field(default_factory=list)
    characters_sent: int = 0
    asked: Feed | None = None
    answer: asyncio.Future[TextDelta] | None = None

    def reopened(self) -> Open:
        first = self.opened
        return Open(
            stream_id=first.stream_id,
            prompt_tail=first.prompt_tail,
            token_ids=tuple(self.fed),
            characters_sent=self.characters_sent,
            stop=first.stop,
            include_stop=first.include_stop,
            min_tokens=first.min_tokens,
            marks=first.marks,
        )


class Ledger:
    """Calls and streams that are open. All methods are plain; futures are how answers reach those who wait."""

    def __init__(self) -> None:
        self._calls: dict[int, OpenCall] = {}
        self._streams: dict[int, Stream] = {}
        self._next_id = 0

    @property
    def num_open(self) -> int:
        return len(self._calls) + len(self._streams)

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def add_call(self, request: Call) -> asyncio.Future[Answer]:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[request.call_id] = OpenCall(request=request, answer=answer)
        return answer

    def add_stream(self, opened: Open) -> None:
        self._streams[opened.stream_id] = Stream(opened=opened)

    def add_feed(self, feed: Feed) -> asyncio.Future[TextDelta]:
        stream = self._streams[feed.stream_id]
        if stream.asked is not None:
            raise ValueError("a stream takes one feed at a time")
        stream.asked = feed
        stream.answer = asyncio.get_running_loop().create_future()
        return stream.answer

    def drop_stream(self, stream_id: int) -> Close | None:
        """Forget a stream; return what to tell the process when it still knows it."""
        return None if self._streams.pop(stream_id, None) is None else Close(stream_id=stream_id)

    def settle_call(self, reply: Answer | Refused) -> None:
        call = self._calls.pop(reply.call_id)
        if not call.answer.done():
            if isinstance(reply, Refused):
                call.answer.set_exception(TextRefused(reply.message))
            else:
                call.answer.set_result(reply)

    def settle_feed(self, delta: Delta) -> None:
        stream = self._streams.get(delta.stream_id)
        if stream is None or stream.asked is None:
            return  # closed while the feed was under way
        asked, stream.asked = stream.asked, None
        stream.fed.extend(asked.token_ids)
        stream.characters_sent += len(delta.text)
        if asked.final or delta.stop_hit:
            del self._streams[delta.stream_id]
        if stream.answer is not None and not stream.answer.done():
            stream.answer.set_result(
                TextDelta(
                    text=delta.text,
                    stop_hit=delta.stop_hit,
                    tokens_consumed=delta.tokens_consumed,
                    tokens_shown=delta.tokens_shown,
                    stop=delta.stop,
                )
            )

    def replay(self) -> list[Request]:
        """Return what a new process must be asked, in order. Calls that have been through too many deaths fail."""
        requests: list[Request] = []
        for call_id, call in tuple(self._calls.items()):
            call.attempts += 1
            if call.attempts <= _CALL_ATTEMPTS and not call.answer.done():
                requests.append(call.request)
                continue
            del self._calls[call_id]
            if not call.answer.done():
                call.answer.set_exception(TextProcessDied("the text process died each time it handled this input"))
        for stream in self._streams.values():
            requests.append(stream.reopened())
            if stream.asked is not None:
                requests.append(stream.asked)
        return requests

    def fail_all(self, error: TextError) -> None:
        """Everyone who waits, waits in vain."""
        futures: list[asyncio.Future[Answer] | asyncio.Future[TextDelta] | None] = [
            *(call.answer for call in self._calls.values()),
            *(stream.answer for stream in self._streams.values()),
        ]
        self._calls.clear()
        self._streams.clear()
        for future in futures:
            if future is not None and not future.done():
                future.set_exception(type(error)(str(error)))
