"""``TextService``: the daemon's side of the text process."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from engines.restarts import GiveUp, RestartPolicy, after_death
from engines.text.child import Child, spawn
from engines.text.errors import TextClosed, TextError, TextProcessDied, TextStartFailed
from engines.text.ledger import Answer, Ledger
from engines.text.protocol import PROMPT_TAIL_TOKENS, TextDelta
from engines.text.wire import (
    About,
    Call,
    Chat,
    ChatOptions,
    Decode,
    Decoded,
    Delta,
    Encode,
    Encoded,
    Feed,
    Open,
    Pieced,
    Pieces,
    Refused,
    Reply,
    Request,
)


def _ignore(_reason: str) -> None:
    pass


class TextService:
    """A ``Text`` in a process of its own, started again when it dies: streams then go on exactly where they were.

    Args:
        model: Directory with tokenizer and chat template.
        python: Interpreter that has transformers; by default this one.
        on_death: Told why the process died, each time (for the log).
    """

    def __init__(
        self,
        *,
        model: Path,
        python: str = sys.executable,
        policy: RestartPolicy = RestartPolicy(),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        on_death: Callable[[str], None] = _ignore,
    ) -> None:
        self.model = model
        self.python = python
        self._policy = policy
        self._clock = clock
        self._sleep = sleep
        self._on_death = on_death
        self._ledger = Ledger()
        self._about = About()
        self._pieces: dict[int, bytes] = {}  # of tokens that were asked for: at most the vocabulary
        self._child: Child | None = None  # None while there is no process that is ready
        self._end: TextError | None = TextClosed("the text service has not been started")
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when the tokenizer is loaded.

        Raises:
            TextStartFailed: With the process's last words; nothing is left behind.
        """
        self._child = await self._spawn_ready()
        self._end = None
        self._watching = asyncio.create_task(self._watch(self._child), name="text-service")

    async def close(self) -> None:
        """End the process. Idempotent."""
        self._fail(TextClosed("the text service was closed"))
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        if self._child is not None:
            child, self._child = self._child, None
            await child.close()

    @property
    def failure(self) -> str | None:
        return None if self._end is None else str(self._end)

    @property
    def about(self) -> About:
        """What else is to be known of the tokenizer, once it has started."""
        return self._about

    @property
    def pid(self) -> int | None:
        """The process that serves now, None while there is none."""
        return None if self._child is None else self._child.pid

    @property
    def num_open(self) -> int:
        """Calls and streams that are not finished."""
        return self._ledger.num_open

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        request = Encode(call_id=self._ledger.new_id(), text=text, add_special_tokens=add_special_tokens)
        return self._token_ids(await self._call(request))

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: ChatOptions = ChatOptions(),
    ) -> tuple[int, ...]:
        conversation = msgspec.json.encode({"messages": messages, "tools": tools, "options": options})
        return self._token_ids(await self._call(Chat(call_id=self._ledger.new_id(), conversation=conversation)))

    async def decode(self, token_ids: Sequence[int]) -> str:
        reply = await self._call(Decode(call_id=self._ledger.new_id(), token_ids=tuple(token_ids)))
        assert isinstance(reply, Decoded)
        return reply.text

    async def pieces(self, token_ids: Sequence[int]) -> list[bytes]:
        missing = tuple({token_id for token_id in token_ids if token_id not in self._pieces})
        if missing:
            reply = await self._call(Pieces(call_id=self._ledger.new_id(), token_ids=missing))
            assert isinstance(reply, Pieced)
            self._pieces.update(zip(missing, reply.pieces, strict=True))
        return [self._pieces[token_id] for token_id in token_ids]

    def open(
        self,
        *,
        prompt_token_ids: tuple[int, ...],
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        marks: tuple[str, ...] = (),
    ) -> "ServiceFeed":
        self._ensure_open()
        request = Open(
            stream_id=self._ledger.new_id(),
            prompt_tail=prompt_token_ids[-PROMPT_TAIL_TOKENS:],
            token_ids=(),
            characters_sent=0,
            stop=stop,
            include_stop=include_stop,
            min_tokens=min_tokens,
            marks=marks,
        )
        self._ledger.add_stream(request)
        self._send(request)
        return ServiceFeed(self, request.stream_id)

    def send_feed(self, feed: Feed) -> asyncio.Future[TextDelta]:
        self._ensure_open()
        answer = self._ledger.add_feed(feed)
        self._send(feed)
        return answer

    def drop(self, stream_id: int) -> None:
        closing = self._ledger.drop_stream(stream_id)
        if closing is not None:
            self._send(closing)

    @staticmethod
    def _token_ids(reply: Answer) -> tuple[int, ...]:
        assert isinstance(reply, Encoded)
        return reply.token_ids

    async def _call(self, request: Call) -> Answer:
        self._ensure_open()
        answer = self._ledger.add_call(request)
        self._send(request)
        return await answer

    def _ensure_open(self) -> None:
        if self._end is not None:
            raise type(self._end)(str(self._end))

    def _send(self, request: Request) -> None:
        if self._child is not None:  # else the ledger replays it to the next process
            self._child.send(request)

    def _on_reply(self, reply: Reply) -> None:
        match reply:
            case Delta():
                self._ledger.settle_feed(reply)
            case Encoded() | Decoded() | Pieced() | Refused():
                self._ledger.settle_call(reply)
            case _:
                raise AssertionError(f"{reply} is the channel's business")

    def _fail(self, end: TextError) -> None:
        self._end = end
        self._ledger.fail_all(end)

    async def _spawn_ready(self) -> Child:
        child = await spawn(python=self.python, model=self.model, on_reply=self._on_reply)
        try:
            self._about = (await child.ready()).about
        except BaseException:
            await child.close()
            raise
        return child

    async def _watch(self, child: Child) -> None:
        """Start the process again each time it dies, until that is hopeless."""
        deaths_s: tuple[float, ...] = ()
        reason = await child.ended()
        while True:
            self._child = None
            await child.close()
            self._on_death(reason)
            deaths_s = (*deaths_s[-self._policy.max_deaths :], self._clock())
            decision = after_death(deaths_s, policy=self._policy)
            if isinstance(decision, GiveUp):
                self._fail(TextProcessDied(f"the text process {decision.reason}, at last: {reason}"))
                return
            await self._sleep(decision.after_s)
            try:
                child = await self._spawn_ready()
            except TextStartFailed as failure:
                reason = str(failure)
                continue
            self._child = child
            for request in self._ledger.replay():
                child.send(request)
            reason = await child.ended()


class ServiceFeed:
    """A ``TextFeed`` of the service."""

    def __init__(self, service: TextService, stream_id: int) -> None:
        self._service = service
        self._stream_id = stream_id

    async def feed(self, token_ids: tuple[int, ...], *, final: bool = False) -> TextDelta:
        return await self._service.send_feed(Feed(stream_id=self._stream_id, token_ids=token_ids, final=final))

    def close(self) -> None:
        self._service.drop(self._stream_id)
