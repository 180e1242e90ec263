"""Answers as bytes. What is equal in all chunks of a stream is encoded once, so a token costs one small string."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

from flexpiped.api.call_parser import CallDelta
from flexpiped.api.errors import ApiError
from flexpiped.api.generation import Piece
from flexpiped.api.logprobs_wire import ChatLogprobs, CompletionLogprobs, prompt_to_wire
from flexpiped.api.token_reports import TokenReport

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request; those that ended the outputs count. ``cached_tokens`` None: the engine does not tell."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None

    def to_wire(self) -> dict[str, Any]:
        cached = self.cached_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            **({} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every chunk of an answer begins with."""

    answer_id: str
    created_unix_s: int
    model: str

    def to_wire(self, kind: str) -> dict[str, Any]:
        return {"id": self.answer_id, "object": kind, "created": self.created_unix_s, "model": self.model}


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """One choice of an answer that is not streamed. ``stop_reason`` as of ``Piece``."""

    text: str
    finish_reason: str
    tokens: Sequence[TokenReport] = ()
    prompt: Sequence[TokenReport] = ()
    stop_reason: str | int | None = None
    calls: Sequence[CallDelta] = ()  # of tools, each as a whole


class AnswerWire(Protocol):
    """One answer, as a stream of events or whole."""

    def first(self, index: int) -> bytes:
        """Events of a choice before any text."""

    def text(self, piece: Piece) -> bytes:
        """The event of some text."""

    def last(self, piece: Piece) -> bytes:
        """Events that end the text of a choice."""

    def usage(self, usage: Usage) -> bytes:
        """The event with the usage, after the last."""

    def whole(self, choices: Sequence[Whole], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The event that tells of an error after the stream began."""
    return b"data: " + error.encode() + b"\n\n"


def _why(end: Piece | Whole) -> dict[str, Any]:
    """Return what vLLM adds to how a choice ended: null where the model or the length ended it."""
    return {"stop_reason": end.stop_reason}


def _around(chunk: dict[str, Any]) -> tuple[bytes, bytes]:
    """Split the event of ``chunk`` around the one string in it that is "@"."""
    before, after = event(chunk).split(b'"@"')
    return before, after


class CompletionWire:
    """Answers of ``/v1/completions``. With ``include_usage`` every chunk has the key, as OpenAI's have.

    ``top``: how many of the likeliest tokens are told with each; None: nothing is told of tokens.
    """

    def __init__(self, head: Head, *, include_usage: bool, choices: int = 1, top: int | None = None) -> None:
        self._start = head.to_wire("text_completion")
        self._rest: dict[str, Any] = {"usage": None} if include_usage else {}
        self._around = [_around(self._chunk(self._choice(index, "@", None))) for index in range(choices)]
        self._logprobs = None if top is None else [CompletionLogprobs(top=top) for _ in range(choices)]

    def first(self, index: int) -> bytes:  # noqa: ARG002
        return b""

    def text(self, piece: Piece) -> bytes:
        if self._logprobs is None:
            before, after = self._around[piece.index]
            return before + _encode(piece.text) + after
        return self.last(piece)

    def last(self, piece: Piece) -> bytes:
        choice = self._choice(piece.index, piece.text, piece.finish_reason, piece.tokens or None)
        return event(self._chunk(choice if piece.finish_reason is None else choice | _why(piece)))

    def usage(self, usage: Usage) -> bytes:
        return event({**self._start, "choices": [], "usage": usage.to_wire()})

    def whole(self, choices: Sequence[Whole], usage: Usage) -> bytes:
        found = [
            self._choice(index, each.text, each.finish_reason, each.tokens) | _why(each) | prompt_to_wire(each.prompt)
            for index, each in enumerate(choices)
        ]
        return _encode({**self._chunk(*found), "usage": usage.to_wire()})

    def _choice(
        self, index: int, text: str, finish_reason: str | None, tokens: Sequence[TokenReport] | None = None
    ) -> dict[str, Any]:
        logprobs = None if tokens is None or self._logprobs is None else self._logprobs[index].to_wire(tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return {**self._start, "choices": choices, **self._rest}


class ChatWire:
    """Answers of ``/v1/chat/completions``; ``top`` as of ``CompletionWire``."""

    def __init__(self, head: Head, *, include_usage: bool, choices: int = 1, top: int | None = None) -> None:
        self._head = head
        self._start = head.to_wire("chat.completion.chunk")
        self._rest: dict[str, Any] = {"usage": None} if include_usage else {}
        self._around = [_around(self._chunk(index, {"content": "@"})) for index in range(choices)]
        self._logprobs = None if top is None else ChatLogprobs(top=top)

    def first(self, index: int) -> bytes:
        return event(self._chunk(index, {"role": "assistant", "content": ""}))

    def text(self, piece: Piece) -> bytes:
        if piece.calls:
            return self._calls(piece)
        if self._logprobs is None:
            before, after = self._around[piece.index]
            return before + _encode(piece.text) + after
        return event(self._chunk(piece.index, {"content": piece.text}, tokens=piece.tokens))

    def _calls(self, piece: Piece) -> bytes:
        """Events of content, if there is some, and of what is new of calls."""
        content = self.text(replace(piece, calls=(), tokens=())) if piece.text else b""
        delta = {"tool_calls": [_delta_to_wire(each) for each in piece.calls]}
        return content + event(self._chunk(piece.index, delta, tokens=piece.tokens))

    def last(self, piece: Piece) -> bytes:
        text = self.text(piece) if piece.says_something else b""
        return text + event(self._chunk(piece.index, {}, piece.finish_reason, why=_why(piece)))

    def usage(self, usage: Usage) -> bytes:
        return event({**self._start, "choices": [], "usage": usage.to_wire()})

    def whole(self, choices: Sequence[Whole], usage: Usage) -> bytes:
        found = [
            {
                "index": index,
                "message": _message(each),
                "logprobs": None if self._logprobs is None else self._logprobs.to_wire(each.tokens),
                "finish_reason": each.finish_reason,
            }
            | _why(each)
            for index, each in enumerate(choices)
        ]
        told = prompt_to_wire(choices[0].prompt)
        return _encode({**self._head.to_wire("chat.completion"), "choices": found, "usage": usage.to_wire(), **told})

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        tokens: Sequence[TokenReport] = (),
        why: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        logprobs = self._logprobs.to_wire(tokens) if tokens and self._logprobs is not None else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason, **why}
        return {**self._start, "choices": [choice], **self._rest}


def _message(whole: Whole) -> dict[str, Any]:
    content = None if whole.calls and not whole.text else whole.text
    calls = {"tool_calls": [_call_to_wire(each) for each in whole.calls]} if whole.calls else {}
    return {"role": "assistant", "content": content, "refusal": None, **calls}


def _call_to_wire(call: CallDelta) -> dict[str, Any]:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _delta_to_wire(delta: CallDelta) -> dict[str, Any]:
    """Return a part of a call: the first one has all but the rest of the arguments."""
    told = _call_to_wire(delta) if delta.name else {"function": {"arguments": delta.arguments}}
    return {"index": delta.index, **told}
