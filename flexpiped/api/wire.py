"""Answers as bytes. What is equal in all chunks of a stream is encoded once, so a token costs one small string."""

from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from flexpiped.api.errors import ApiError

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request; the one that ended the output counts."""

    prompt_tokens: int
    completion_tokens: int

    def to_wire(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every chunk of an answer begins with."""

    answer_id: str
    created_unix_s: int
    model: str

    def to_wire(self, kind: str) -> dict[str, Any]:
        return {"id": self.answer_id, "object": kind, "created": self.created_unix_s, "model": self.model}


class AnswerWire(Protocol):
    """One answer, as a stream of events or whole."""

    def first(self) -> bytes:
        """Events before any text."""

    def text(self, text: str) -> bytes:
        """The event of some text."""

    def last(self, text: str, finish_reason: str) -> bytes:
        """Events that end the text."""

    def usage(self, usage: Usage) -> bytes:
        """The event with the usage, after the last."""

    def whole(self, text: str, finish_reason: str, usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The event that tells of an error after the stream began."""
    return b"data: " + error.encode() + b"\n\n"


def _around(chunk: dict[str, Any]) -> tuple[bytes, bytes]:
    """Split the event of ``chunk`` around the one string in it that is "@"."""
    before, after = event(chunk).split(b'"@"')
    return before, after


class CompletionWire:
    """Answers of ``/v1/completions``. With ``include_usage`` every chunk has the key, as OpenAI's have."""

    def __init__(self, head: Head, *, include_usage: bool) -> None:
        self._start = head.to_wire("text_completion")
        self._rest: dict[str, Any] = {"usage": None} if include_usage else {}
        self._before, self._after = _around(self._chunk("@", None))

    def first(self) -> bytes:
        return b""

    def text(self, text: str) -> bytes:
        return self._before + _encode(text) + self._after

    def last(self, text: str, finish_reason: str) -> bytes:
        return event(self._chunk(text, finish_reason))

    def usage(self, usage: Usage) -> bytes:
        return event({**self._start, "choices": [], "usage": usage.to_wire()})

    def whole(self, text: str, finish_reason: str, usage: Usage) -> bytes:
        return _encode({**self._chunk(text, finish_reason), "usage": usage.to_wire()})

    def _chunk(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return {**self._start, "choices": [choice], **self._rest}


class ChatWire:
    """Answers of ``/v1/chat/completions``."""

    def __init__(self, head: Head, *, include_usage: bool) -> None:
        self._head = head
        self._start = head.to_wire("chat.completion.chunk")
        self._rest: dict[str, Any] = {"usage": None} if include_usage else {}
        self._before, self._after = _around(self._chunk({"content": "@"}, None))

    def first(self) -> bytes:
        return event(self._chunk({"role": "assistant", "content": ""}, None))

    def text(self, text: str) -> bytes:
        return self._before + _encode(text) + self._after

    def last(self, text: str, finish_reason: str) -> bytes:
        return (self.text(text) if text else b"") + event(self._chunk({}, finish_reason))

    def usage(self, usage: Usage) -> bytes:
        return event({**self._start, "choices": [], "usage": usage.to_wire()})

    def whole(self, text: str, finish_reason: str, usage: Usage) -> bytes:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return _encode({**self._head.to_wire("chat.completion"), "choices": [choice], "usage": usage.to_wire()})

    def _chunk(self, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._start, "choices": [choice], **self._rest}
