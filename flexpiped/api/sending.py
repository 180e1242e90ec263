"""Giving an answer: as server-sent events or whole."""

from collections.abc import AsyncGenerator

from aiohttp import ClientConnectionResetError, web

from engines.errors import EngineError
from flexpiped.api.errors import ApiError, from_engine_error
from flexpiped.api.generation import Piece
from flexpiped.api.metrics import Observation, Outcome
from flexpiped.api.wire import DONE, AnswerWire, Usage, error_event

_SSE_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


async def send_whole(
    pieces: AsyncGenerator[Piece, None], wire: AnswerWire, observation: Observation
) -> web.StreamResponse:
    """Collect the text and answer with it.

    Raises:
        ApiError, EngineError
    """
    texts: list[str] = []
    finish_reason = ""
    async for piece in pieces:
        observation.tokens(piece.completion_tokens)
        texts.append(piece.text)
        finish_reason = piece.finish_reason or ""
    observation.outcome = Outcome.DONE
    body = wire.whole("".join(texts), finish_reason, usage_of(observation))
    return web.Response(body=body, content_type="application/json")


async def send_events(
    http: web.Request,
    pieces: AsyncGenerator[Piece, None],
    wire: AnswerWire,
    observation: Observation,
    *,
    include_usage: bool,
) -> web.StreamResponse:
    """Send the text as it comes. The status waits for the first token, so that an early error still has one of its own.

    An error after that is sent as an event and ends the stream; a client that has gone is no error.

    Raises:
        ApiError, EngineError: Before the first token.
    """
    first = await anext(pieces)
    response = web.StreamResponse(headers=_SSE_HEADERS)
    try:
        await response.prepare(http)
        try:
            await response.write(wire.first() + _event_of(first, wire, observation))
            async for piece in pieces:
                data = _event_of(piece, wire, observation)
                if data:
                    await response.write(data)
        except (ApiError, EngineError) as error:
            await response.write(error_event(error if isinstance(error, ApiError) else from_engine_error(error)))
            observation.outcome = Outcome.FAILED
            return response
        await response.write((wire.usage(usage_of(observation)) if include_usage else b"") + DONE)
        observation.outcome = Outcome.DONE
    except ClientConnectionResetError:
        observation.outcome = Outcome.DISCONNECTED
    return response


def usage_of(observation: Observation) -> Usage:
    return Usage(prompt_tokens=observation.prompt_tokens, completion_tokens=observation.completion_tokens)


def _event_of(piece: Piece, wire: AnswerWire, observation: Observation) -> bytes:
    observation.tokens(piece.completion_tokens)
    if piece.finish_reason is not None:
        return wire.last(piece.text, piece.finish_reason)
    return wire.text(piece.text) if piece.text else b""
