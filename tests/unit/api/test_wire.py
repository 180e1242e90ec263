"""Answers look as OpenAI's do."""

import json
from typing import Any

import pytest

from flexpiped.api.errors import invalid
from flexpiped.api.generation import Piece
from flexpiped.api.logprobs_wire import CompletionLogprobs
from flexpiped.api.token_reports import TokenReport
from flexpiped.api.wire import ChatWire, CompletionWire, Head, Usage, Whole, error_event

HEAD = Head(answer_id="id-1", created_unix_s=5, model='odd "model" @')
USAGE = Usage(prompt_tokens=2, completion_tokens=3)
USAGE_WIRE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
TEXT = 'quote " backslash \\ newline \n 漢 🙂 "@"'


def piece(text: str, finish_reason: str | None = None) -> Piece:
    return Piece(text=text, completion_tokens=3, finish_reason=finish_reason)


def events_of(data: bytes) -> list[dict[str, Any]]:
    *events, rest = data.split(b"\n\n")
    assert rest == b""
    assert all(event.startswith(b"data: ") for event in events)
    return [json.loads(event[6:]) for event in events]


@pytest.mark.parametrize("include_usage", [False, True])
def test_completion_events(include_usage: bool) -> None:
    wire = CompletionWire(HEAD, include_usage=include_usage)
    base = {"id": "id-1", "object": "text_completion", "created": 5, "model": HEAD.model}
    rest = {"usage": None} if include_usage else {}
    choice = {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": None}
    assert wire.first(0) == b""
    assert events_of(wire.text(piece(TEXT))) == [{**base, "choices": [choice], **rest}]
    last = {**choice, "text": "", "finish_reason": "stop", "stop_reason": None}
    assert events_of(wire.last(piece("", "stop"))) == [{**base, "choices": [last], **rest}]
    assert events_of(wire.usage(USAGE)) == [{**base, "choices": [], "usage": USAGE_WIRE}]


def test_whole_completion() -> None:
    whole = json.loads(
        CompletionWire(HEAD, include_usage=False).whole([Whole(text=TEXT, finish_reason="length")], USAGE)
    )
    choice = {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    base = {"id": "id-1", "object": "text_completion", "created": 5, "model": HEAD.model}
    assert whole == {**base, "choices": [choice], "usage": USAGE_WIRE}


def test_offsets_are_those_of_the_text_where_a_character_is_split_between_tokens() -> None:
    data = [b"a", b"\xf0\x9f", b"\x99\x82", b"\xc3\xa9x", b"b"]
    tokens = [TokenReport(token_id=i, data=each, logprob=-1.0) for i, each in enumerate(data)]
    logprobs = CompletionLogprobs(top=0)
    parts = [logprobs.to_wire(tokens[:2]), logprobs.to_wire(tokens[2:])]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 1, 1, 2, 4]


def test_how_much_of_the_prompt_was_cached_is_told_where_the_engine_tells_it() -> None:
    usage = Usage(prompt_tokens=40, completion_tokens=3, cached_tokens=32).to_wire()
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}
    assert USAGE.to_wire() == USAGE_WIRE


def test_chat_events() -> None:
    wire = ChatWire(HEAD, include_usage=False)
    base = {"id": "id-1", "object": "chat.completion.chunk", "created": 5, "model": HEAD.model}

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**base, "choices": [choice if finish_reason is None else choice | {"stop_reason": None}]}

    assert events_of(wire.first(0)) == [chunk({"role": "assistant", "content": ""})]
    assert events_of(wire.text(piece(TEXT))) == [chunk({"content": TEXT})]
    assert events_of(wire.last(piece("end", "stop"))) == [chunk({"content": "end"}), chunk({}, "stop")]
    assert events_of(wire.last(piece("", "length"))) == [chunk({}, "length")]
    assert events_of(wire.usage(USAGE)) == [{**base, "choices": [], "usage": USAGE_WIRE}]


def test_whole_chat() -> None:
    whole = json.loads(ChatWire(HEAD, include_usage=False).whole([Whole(text="hi", finish_reason="stop")], USAGE))
    message = {"role": "assistant", "content": "hi", "refusal": None}
    assert whole["object"] == "chat.completion"
    end = {"finish_reason": "stop", "stop_reason": None}
    assert whole["choices"] == [{"index": 0, "message": message, "logprobs": None, **end}]
    assert whole["usage"] == USAGE_WIRE


def test_errors() -> None:
    error = invalid("no", param="n", code="unsupported_parameter")
    shape = {"message": "no", "type": "invalid_request_error", "param": "n", "code": "unsupported_parameter"}
    assert events_of(error_event(error)) == [{"error": shape}]
