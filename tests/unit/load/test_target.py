"""What is sent, and to where."""

import pytest

from flexpiped.load.target import BadTarget, Endpoint, Target, parse_url, prompt_tokens
from planner.traces import TraceRequest

REQUEST = TraceRequest(arrival_s=0.0, prompt_tokens=5, output_tokens=3)


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://127.0.0.1:8100", "http://127.0.0.1:8100/v1"),
        ("http://host/v1/", "http://host/v1"),
        ("https://host/openai/v1", "https://host/openai/v1"),
    ],
)
def test_urls(given: str, base: str) -> None:
    assert parse_url(given) == base


@pytest.mark.parametrize("given", ["", "host:8100", "ftp://host", "http://", "http://host:99999/", "http://h/v1?x=1"])
def test_what_is_no_url(given: str) -> None:
    with pytest.raises(BadTarget):
        parse_url(given)


def test_a_strict_server_gets_only_what_openai_knows() -> None:
    plain, strict = Target(url="u", model="m"), Target(url="u", model="m", strict=True)

    assert plain.body(REQUEST, seed=1)["ignore_eos"] is True
    assert "ignore_eos" not in strict.body(REQUEST, seed=1)
    assert plain.body(REQUEST, seed=1)["prompt"] == strict.body(REQUEST, seed=1)["prompt"]


def test_a_chat_has_words() -> None:
    body = Target(url="u", model="m", endpoint=Endpoint.CHAT).body(REQUEST, seed=1)

    assert len(body["messages"][0]["content"].split()) == 5


def test_prompts_share_the_pieces_that_the_trace_says() -> None:
    first = TraceRequest(arrival_s=0.0, prompt_tokens=1200, output_tokens=1, prefix_ids=(4, 5, 6))
    second = TraceRequest(arrival_s=0.0, prompt_tokens=1300, output_tokens=1, prefix_ids=(4, 5, 7))
    one, two = prompt_tokens(first, seed=1), prompt_tokens(second, seed=2)

    assert (len(one), len(two)) == (1200, 1300)
    assert one[:1024] == two[:1024]
    assert one[1024:] != two[1024:1200]
