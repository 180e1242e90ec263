"""From tokens to text: one request through engine and text process, as one choice or several."""

import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import msgspec

from engines.closing import closing
from engines.protocol import FinishReason, GenerationRequest, Grammar, TokenChunk
from flexpiped.api.backend import Backend
from flexpiped.api.call_parser import CallDelta, CallParser
from flexpiped.api.errors import ApiError, ErrorType, invalid
from flexpiped.api.merging import merged
from flexpiped.api.token_reports import TokenReport, prompt_reports, reports_of
from flexpiped.api.tool_syntax import ToolCalls
from flexpiped.api.tools import ToolChoice, Tools


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadsCalls:
    """How calls of tools are read from an output. ``finish``: the word for an output that ends with calls.

    ``schemas``: of the arguments of each tool, where they are needed.
    """

    calls: ToolCalls
    finish: str
    schemas: Mapping[str, Any] = field(default_factory=dict)


def reads_calls(tools: Tools, calls: ToolCalls) -> ReadsCalls | None:
    """Return how calls are read, None where there are to be none. A call that was named ends with OpenAI's "stop"."""
    if tools.choice is ToolChoice.NONE:
        return None
    needed = tools.functions if calls.syntax.is_tagged else ()
    return ReadsCalls(
        calls=calls,
        finish="stop" if tools.only else "tool_calls",
        schemas={each.name: msgspec.json.decode(each.schema) for each in needed},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One choice of a request that has been checked and admitted.

    ``lead`` is text that comes first. ``tells_tokens``: pieces tell of their tokens, and with ``leads_tokens`` the
    first one begins with those of the prompt. ``prompt_top``: it tells of the prompt's apart from these, with so
    many of the likeliest; None: it does not.
    ``tells_cached``: its first piece tells what of the prompt was in the KV cache.
    ``is_prompt_only``: what comes of the engine is not wanted but for what it says of the prompt.
    ``reads``: how calls of tools are read from it, None: it is text.
    """

    request: GenerationRequest
    stop: tuple[str, ...]
    include_stop: bool
    ends: frozenset[int]  # tokens with which the model ends it by itself
    index: int = 0
    min_tokens: int = 0  # before which stop strings are not looked for
    lead: str = ""
    tells_tokens: bool = False
    prompt_top: int | None = None
    leads_tokens: bool = False
    tells_cached: bool = True
    is_prompt_only: bool = False
    reads: ReadsCalls | None = None

    def is_told_to_stop_at(self, token: int) -> bool:
        """Return whether ``token`` ends the output because the request says so, and not the model by itself."""
        return token in self.request.sampling.stop_token_ids and token not in self.ends

    def ends_at(self, token: int) -> bool:
        return token in self.ends or token in self.request.sampling.stop_token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Text that can be sent, perhaps none. ``completion_tokens`` counts all so far; the last piece has a reason.

    ``tokens`` are those of which all text has been sent by now, and that no piece before told of. A token that is part
    of a stop string is never told. ``logprob``, of the last piece: that of all tokens, 0 where it is not asked for.
    ``cached_tokens``, where the engine tells it: how many of the prompt's tokens were in its KV cache.
    ``stop_reason``, of the last piece: the stop string or the stop token of the request that ended it, None where the
    model itself did.
    """

    text: str
    completion_tokens: int
    finish_reason: str | None
    index: int = 0
    tokens: tuple[TokenReport, ...] = ()
    prompt: tuple[TokenReport, ...] = ()
    logprob: float = 0.0
    cached_tokens: int | None = None
    stop_reason: str | int | None = None
    calls: tuple[CallDelta, ...] = ()  # after the text

    @property
    def says_something(self) -> bool:
        return bool(self.text or self.tokens or self.calls)


def finish_word(reason: FinishReason | None, grammar: Grammar | None = None) -> str | None:
    """Return OpenAI's word. Raises: ApiError: the engine gave the request up by itself, or for its ``grammar``."""
    if reason is FinishReason.ABORT and grammar is not None:
        message = f"{grammar.parameter}: nothing could follow that the grammar and what else limits the output allow"
        raise invalid(message, param=grammar.parameter, code="grammar_failed")
    if reason is FinishReason.ABORT:
        raise ApiError(
            status=500, type=ErrorType.INTERNAL, message="the engine aborted the request", code="engine_aborted"
        )
    return None if reason is None else reason.value


def choices_of(backend: Backend, jobs: Sequence[Job]) -> AsyncIterator[Piece]:
    """Run the choices of one request side by side. Closing the iterator aborts all of them.

    Raises:
        ApiError, EngineError
    """
    if len(jobs) == 1:
        return pieces_of(backend, jobs[0])
    return merged([pieces_of(backend, job) for job in jobs])


async def pieces_of(backend: Backend, job: Job) -> AsyncIterator[Piece]:
    """Run one choice. Closing the iterator, or a stop string, aborts it in the engine and forgets its text.

    Raises:
        ApiError, EngineError
    """
    completion_tokens, last = 0, -1
    told = _Told(backend, job) if job.prompt_top is not None or job.request.sampling.logprobs else None
    lead = job.lead
    parser = None if job.reads is None else CallParser(job.reads.calls.syntax, schemas=job.reads.schemas)
    feed = backend.text.open(
        prompt_token_ids=job.request.prompt_token_ids,
        stop=job.stop,
        include_stop=job.include_stop,
        min_tokens=job.min_tokens,
        marks=() if job.reads is None else job.reads.calls.marks,
    )
    with contextlib.closing(feed):
        async with closing(backend.serving.generate(job.request)) as chunks:
            async for chunk in chunks:
                token_ids = chunk.token_ids
                is_first = completion_tokens == 0  # of this request, whatever engine goes on with it
                completion_tokens += len(token_ids)
                finish = finish_word(chunk.finish_reason, job.request.sampling.grammar)
                last = token_ids[-1] if token_ids else last
                reason: str | int | None = last if finish == "stop" and job.is_told_to_stop_at(last) else None
                is_cut = bool(token_ids) and not job.include_stop and job.ends_at(token_ids[-1])
                shown = token_ids[:-1] if is_cut else token_ids
                delta = await feed.feed(shown, final=finish is not None)
                text, lead = lead + delta.text, ""
                if delta.stop_hit:
                    completion_tokens, finish, reason = delta.tokens_consumed, "stop", delta.stop
                piece = Piece(
                    text=text,
                    completion_tokens=completion_tokens,
                    finish_reason=finish,
                    index=job.index,
                    cached_tokens=chunk.cached_tokens if is_first and job.tells_cached else None,
                    stop_reason=reason,
                )
                if parser is not None and job.reads is not None:
                    piece = _with_calls(piece, parser, ends_with_calls=job.reads.finish)
                if told is not None:
                    all_shown = finish is not None and not delta.stop_hit
                    piece = await told.with_tokens(piece, chunk, shown=None if all_shown else delta.tokens_shown)
                if job.is_prompt_only:
                    yield without_output(piece, job)
                    return
                yield piece
                if delta.stop_hit:
                    return


def _with_calls(piece: Piece, parser: CallParser, *, ends_with_calls: str) -> Piece:
    """Return ``piece`` with its text divided into content and calls."""
    finish = piece.finish_reason
    content, calls = parser.feed(piece.text, final=finish is not None)
    finish = ends_with_calls if finish == "stop" and parser.count else finish
    return replace(piece, text=content, calls=calls, finish_reason=finish)


def without_output(first: Piece, job: Job) -> Piece:
    """Return the whole answer of a request that wants no output."""
    tokens = first.tokens[: len(job.request.prompt_token_ids)] if job.leads_tokens else ()
    return replace(first, text=job.lead, completion_tokens=0, finish_reason="length", tokens=tokens, logprob=0.0)


class _Told:
    """What pieces tell of tokens, of one choice."""

    def __init__(self, backend: Backend, job: Job) -> None:
        self._text = backend.text
        self._job = job
        self._waiting: deque[TokenReport] = deque()  # until their text is sent
        self._logprobs: list[float] = []
        self._num_told = 0
        self._prompt_is_due = job.prompt_top is not None or job.leads_tokens

    async def with_tokens(self, piece: Piece, chunk: TokenChunk, *, shown: int | None) -> Piece:
        """Return ``piece`` with the tokens that it may tell of: ``shown`` in all, None: every one."""
        self._logprobs += chunk.logprobs
        prompt: tuple[TokenReport, ...] = ()
        if self._prompt_is_due:
            self._prompt_is_due = False
            prompt = tuple(await prompt_reports(self._text, self._job.request.prompt_token_ids, chunk.prompt_logprobs))
        tokens: tuple[TokenReport, ...] = ()
        if self._job.tells_tokens:
            self._waiting += await reports_of(self._text, chunk)
            count = len(self._waiting) if shown is None else shown - self._num_told
            tokens = tuple(islice(self._waiting, count))
            for _ in tokens:
                self._waiting.popleft()
            self._num_told += len(tokens)
        return replace(
            piece,
            tokens=(*prompt, *tokens) if self._job.leads_tokens else tokens,
            prompt=self._apart(prompt),
            logprob=0.0 if piece.finish_reason is None else sum(self._logprobs[: piece.completion_tokens]),
        )

    def _apart(self, prompt: tuple[TokenReport, ...]) -> tuple[TokenReport, ...]:
        """Return those of the prompt with as many of the likeliest as are wanted there: ``echo`` may want more."""
        top = self._job.prompt_top
        return () if top is None else tuple(replace(each, top=each.top[:top]) for each in prompt)
