"""From tokens to text: one request through engine and text process."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from engines.closing import closing
from engines.protocol import FinishReason, GenerationRequest
from flexpiped.api.backend import Backend
from flexpiped.api.errors import ApiError, ErrorType


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request that has been checked and admitted."""

    request: GenerationRequest
    stop: tuple[str, ...]
    include_stop: bool
    ending: frozenset[int]  # tokens that end it; they have no text


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Text that can be sent, perhaps none. ``completion_tokens`` counts all so far; the last piece has a reason."""

    text: str
    completion_tokens: int
    finish_reason: str | None


def finish_word(reason: FinishReason | None) -> str | None:
    """Return OpenAI's word. Raises: ApiError: the engine gave the request up by itself."""
    if reason is FinishReason.ABORT:
        raise ApiError(
            status=500, type=ErrorType.INTERNAL, message="the engine aborted the request", code="engine_aborted"
        )
    return None if reason is None else reason.value


async def pieces_of(backend: Backend, job: Job) -> AsyncIterator[Piece]:
    """Run the request. Closing the iterator, or a stop string, aborts it in the engine and forgets its text.

    Raises:
        ApiError, EngineError
    """
    completion_tokens = 0
    feed = backend.text.open(
        prompt_token_ids=job.request.prompt_token_ids, stop=job.stop, include_stop=job.include_stop
    )
    with contextlib.closing(feed):
        async with closing(backend.serving.generate(job.request)) as chunks:
            async for chunk in chunks:
                token_ids = chunk.token_ids
                completion_tokens += len(token_ids)
                finish = finish_word(chunk.finish_reason)
                shown = token_ids[:-1] if token_ids and token_ids[-1] in job.ending else token_ids
                delta = await feed.feed(shown, final=finish is not None)
                if delta.stop_hit:
                    yield Piece(text=delta.text, completion_tokens=delta.tokens_consumed, finish_reason="stop")
                    return
                yield Piece(text=delta.text, completion_tokens=completion_tokens, finish_reason=finish)
