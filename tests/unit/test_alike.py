"""The comparison of two servers' answers, by itself."""

from dataclasses import replace

from tests.support.alike import Answered, differences, joined


def test_the_comparison_sees_what_differs() -> None:
    one = Answered(status=200, content_type="application/json", value={"a": [{"b": 1, "id": "x"}], "c": None})
    assert list(differences(one, one, drawn=False)) == []
    other = replace(one, value={"a": [{"b": True, "id": "y"}], "d": 0.5})
    assert list(differences(one, other, drawn=False)) == [
        "a.#.b: 1 -> true",
        "c: null -> nothing",
        "d: nothing -> 0.5",
    ]
    assert list(differences(one, replace(one, status=400), drawn=False)) == ["status: 200 -> 400"]


def test_a_stream_is_put_together() -> None:
    chunks = [
        '{"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}',
        '{"id": "x", "choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [1]}}]}',
        '{"id": "x", "choices": [{"index": 0, "delta": {"content": "b"}, "finish_reason": "stop"}]}',
        '{"id": "x", "choices": [], "usage": {"total_tokens": 2}}',
        "[DONE]",
    ]
    choice = {
        "index": 0,
        "delta": {"role": "assistant", "content": "ab"},
        "logprobs": {"content": [1]},
        "finish_reason": "stop",
    }
    assert joined("".join(f"data: {chunk}\n\n" for chunk in chunks)) == {
        "id": "x",
        "choices": {"0": choice},
        "usage": {"total_tokens": 2},
        "ends": "data: [DONE]",
        "rest": "",
        "chunks_without_choices": 1,
    }


def test_calls_of_a_stream_are_put_together() -> None:
    deltas = [
        '[{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]',
        '[{"index": 0, "function": {"arguments": "{"}}, {"index": 1, "id": "b", "function": {"name": "g"}}]',
        '[{"index": 0, "function": {"arguments": "}"}}]',
    ]
    chunks = [f'{{"choices": [{{"index": 0, "delta": {{"tool_calls": {each}}}}}]}}' for each in deltas]
    found = joined("".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"]))
    assert found["choices"]["0"]["delta"]["tool_calls"] == {
        "0": {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        "1": {"index": 1, "id": "b", "function": {"name": "g"}},
    }
