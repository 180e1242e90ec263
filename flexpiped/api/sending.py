"""Giving an answer: as server-sent events or whole."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from aiohttp import ClientConnectionResetError, web

from engines.errors import EngineError
from flexpiped.api.call_parser import CallDelta, joined
from flexpiped.api.deadline import InMidStream
from flexpiped.api.errors import ApiError, from_engine_error
from flexpiped.api.event_stream import EventStream
from flexpiped.api.generation import Piece
from flexpiped.api.metrics import Observation
from flexpiped.api.outcomes import Outcome, outcome_of
from flexpiped.api.token_reports import TokenReport
from flexpiped.api.wire import DONE, AnswerWire, Usage, Whole, error_event

_SSE_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


@dataclass(slots=True)
class _Made:
    """One choice as it comes."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenReport] = field(default_factory=list)
    prompt: tuple[TokenReport, ...] = ()
    last: Piece | None = None
    calls: list[CallDelta] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.calls += piece.calls
        self.tokens += piece.tokens
        self.prompt = piece.prompt or self.prompt
        self.last = piece

    @property
    def mean_logprob(self) -> float:
        return 0.0 if self.last is None else self.last.logprob / max(self.last.completion_tokens, 1)

    def whole(self) -> Whole:
        finish_reason = "" if self.last is None else self.last.finish_reason or ""
        return Whole(
            text="".join(self.texts),
            finish_reason=finish_reason,
            tokens=self.tokens,
            prompt=self.prompt,
            stop_reason=None if self.last is None else self.last.stop_reason,
            calls=joined(self.calls),
        )


async def send_whole(
    pieces: AsyncGenerator[Piece, None],
    wire: AnswerWire,
    observation: Observation,
    *,
    made: int = 1,
    wanted: int = 1,
    prompts: int = 1,
) -> web.StreamResponse:
    """Collect the choices and answer with them, prompt by prompt.

    Of ``made`` of each prompt the ``wanted`` likeliest are given, by the mean over their tokens.

    Raises:
        ApiError, EngineError
    """
    counts = [0] * (made * prompts)
    choices = [_Made() for _ in counts]
    async for piece in pieces:
        _count(piece, counts, observation)
        choices[piece.index].add(piece)
    if wanted < made:
        of_prompts = (choices[i : i + made] for i in range(0, len(choices), made))
        choices = [each for some in of_prompts for each in sorted(some, key=lambda one: -one.mean_logprob)[:wanted]]
    observation.outcome = Outcome.DONE
    body = wire.whole([each.whole() for each in choices], usage_of(observation))
    return web.Response(body=body, content_type="application/json")


async def send_events(
    http: web.Request,
    pieces: AsyncGenerator[Piece, None],
    wire: AnswerWire,
    observation: Observation,
    *,
    limit: asyncio.Timeout,
    include_usage: bool,
    choices: int = 1,
) -> web.StreamResponse:
    """Send the text as it comes. The status waits for the first token, so that an early error still has one of its own.

    An error after that is sent as an event and ends the stream; a client that has gone is no error.

    Args:
        limit: Of the whole answer, in force.

    Raises:
        ApiError, EngineError: Before the first token.
        ClientStoppedReading
    """
    first = await anext(pieces)
    response = EventStream(headers=_SSE_HEADERS)
    counts = [0] * choices
    try:
        await response.prepare(http)
        try:
            async with InMidStream(limit, http):
                heads = b"".join(wire.first(index) for index in range(choices))
                await response.write(heads + _event_of(first, wire, counts, observation))
                async for piece in pieces:
                    data = _event_of(piece, wire, counts, observation)
                    if data:
                        await response.write(data)
                await response.write_eof((wire.usage(usage_of(observation)) if include_usage else b"") + DONE)
        except (ApiError, EngineError) as error:
            told = error if isinstance(error, ApiError) else from_engine_error(error)
            await response.write(error_event(told))
            observation.outcome = outcome_of(told.status, told.code)
            return response
        observation.outcome = Outcome.DONE
    except ClientConnectionResetError:
        observation.outcome = Outcome.DISCONNECTED
    return response


def usage_of(observation: Observation) -> Usage:
    return Usage(
        prompt_tokens=observation.prompt_tokens,
        completion_tokens=observation.completion_tokens,
        cached_tokens=observation.cached_tokens,
    )


def _event_of(piece: Piece, wire: AnswerWire, counts: list[int], observation: Observation) -> bytes:
    _count(piece, counts, observation)
    if piece.finish_reason is not None:
        return wire.last(piece)
    return wire.text(piece) if piece.says_something else b""


def _count(piece: Piece, counts: list[int], observation: Observation) -> None:
    counts[piece.index] = piece.completion_tokens
    if piece.cached_tokens is not None:
        observation.cached_tokens = (observation.cached_tokens or 0) + piece.cached_tokens
    observation.tokens(sum(counts), in_a_row=max(counts))
