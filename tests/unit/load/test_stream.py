"""What is measured of an answer, however its bytes are cut, and what is no answer."""

import json

import pytest

from flexpiped.load.stream import AnswerStream, BrokenStream


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(words: str) -> bytes:
    return event(choices=[{"text": words, "finish_reason": None}])


def role() -> bytes:
    return event(choices=[{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}])


def content(words: str) -> bytes:
    return event(choices=[{"delta": {"content": words}}])


USAGE = event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": 7})
DONE = b"data: [DONE]\n\n"


def test_first_and_last_token_and_the_servers_count() -> None:
    stream = AnswerStream()
    for at_s, data in enumerate((text("a"), text("b"), text("c"), USAGE, DONE)):
        stream.feed(data, now_s=float(at_s))
    stream.finish()

    assert (stream.first_s, stream.last_s, stream.output_tokens) == (0.0, 2.0, 7)


def test_a_chat_begins_with_its_first_word() -> None:
    stream = AnswerStream()
    for at_s, data in enumerate((role(), content("a"), content("b"), DONE)):
        stream.feed(data, now_s=float(at_s))
    stream.finish()

    assert (stream.first_s, stream.last_s, stream.output_tokens) == (1.0, 2.0, 2)


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_bytes_may_be_cut_anywhere(size: int) -> None:
    stream, data = AnswerStream(), b": a comment\n\n" + text("a") + text("b").replace(b"\n", b"\r\n") + USAGE + DONE
    for start in range(0, len(data), size):
        stream.feed(data[start : start + size], now_s=float(start))
    stream.finish()

    assert stream.output_tokens == 7


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (text("a"), "the stream broke off after 1 events"),
        (DONE, "the answer has no token"),
        (b"data: {nonsense\n\n", "cannot be read"),
        (b"data: [1]\n\n", "no object"),
        (event(choices=["a"]), "cannot be read"),
        (event(choices=[], usage={"total": 1}), "cannot be read"),
        (event(error={"message": "out of memory"}), "the server says: out of memory"),
    ],
)
def test_what_is_no_answer(data: bytes, reason: str) -> None:
    stream = AnswerStream()

    def read() -> None:
        stream.feed(data, now_s=0.0)
        stream.finish()

    with pytest.raises(BrokenStream, match=reason):
        read()
