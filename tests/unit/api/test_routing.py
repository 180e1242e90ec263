"""Which requests are ours, which the engine's own server's, and which are refused."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from engines.fake import FAKE_CAPABILITIES
from engines.sglang.own_server import own_server as sglang_server
from engines.sglang.sampling import ENGINE_PARAMS as SGLANG_PARAMS
from flexpiped.api.errors import ApiError
from flexpiped.api.own_bodies import refuse_unfit
from flexpiped.api.parameters import ChatRequest, CompletionRequest
from flexpiped.api.routing import CHAT, COMPLETIONS, ToEngine, route
from flexpiped.api.unsupported import CHAT_NEUTRAL, COMPLETION_NEUTRAL
from tests.support.fake_own_server import with_server

VLLM = with_server(FAKE_CAPABILITIES)
USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def completion(body: dict[str, Any]) -> CompletionRequest | ToEngine:
    return route(COMPLETIONS, {"prompt": "Once", **body}, served="tiny", capabilities=VLLM)


def chat(body: dict[str, Any], *, args: tuple[str, ...] = ()) -> ChatRequest | ToEngine:
    capabilities = with_server(FAKE_CAPABILITIES, args=args)
    return route(CHAT, {"messages": [USER], **body}, served="tiny", capabilities=capabilities)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": "tiny", "max_tokens": 5, "temperature": 0, "stop": ["x"], "stream": True},
        {"min_p": 0.1, "logit_bias": {"5": 1}, "allowed_token_ids": [5]},
        {"min_tokens": 3},
        {"n": 1, "echo": False, "best_of": 1, "response_format": {"type": "text"}},
        {"cache_salt": None},
        {"prompt": ["one"]},
        {"prompt": ["one", "two"]},
    ],
)
def test_completions_of_ours(body: dict[str, Any]) -> None:
    assert isinstance(completion(body), CompletionRequest)


@pytest.mark.parametrize(
    ("body", "because"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"cache_salt": "s"}, "cache_salt"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"prompt": None, "prompt_embeds": "x"}, "prompt_embeds"),
        ({"model": "adapter"}, "model"),
        ({"min_tokens": 3, "stop": "x"}, "min_tokens"),
        ({"skip_special_tokens": False, "min_p": 0.5}, "skip_special_tokens"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"n": 2, "temperature": "hot"}, "n"),  # the server refuses it
    ],
)
def test_completions_of_the_engine(body: dict[str, Any], because: str) -> None:
    assert completion(body) == ToEngine(because)


@pytest.mark.parametrize(
    ("body", "because"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logprobs": True, "top_logprobs": 2}, "logprobs"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[1].tool_call_id"),
        ({"messages": [USER, {"role": "critic", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ],
)
def test_chats_of_the_engine(body: dict[str, Any], because: str) -> None:
    assert chat(body) == ToEngine(because)


def test_a_server_that_renders_chats_in_its_own_way_gets_them_all() -> None:
    assert isinstance(chat({}, args=("--enable-auto-tool-choice", "--seed", "3")), ChatRequest)
    assert chat({}, args=("--chat_template=/x.jinja",)) == ToEngine("--chat-template")
    assert chat({}, args=("--reasoning-parser", "qwen3")) == ToEngine("--reasoning-parser")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"mox_tokens": 5}, "mox_tokens"),
        ({"mox_tokens": 5, "n": 2}, "mox_tokens"),
        ({"guided_json": {}}, "guided_json"),  # vLLM would ignore it
        ({"best_of": 2, "n": 2}, "best_of"),
        ({"temperature": "hot"}, "temperature"),
        ({"min_p": 2}, "min_p"),
        ({"prompt": None}, "prompt"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ],
)
def test_what_is_wrong_is_refused_here(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(body)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("body", [{"store": True, "n": 2}, {"audio": {}}, {"messages": "x"}, {"messages": [{}]}])
def test_chats_that_nobody_takes_are_refused_here(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError):
        chat(body)


def test_without_a_server_all_is_ours_or_refused() -> None:
    for body in ({"logprobs": 2}, {"cache_salt": "x"}, {"min_p": 0.5}):
        with pytest.raises(ApiError):
            route(COMPLETIONS, {"prompt": "Once", **body}, served="tiny", capabilities=FAKE_CAPABILITIES)
    for capabilities in (FAKE_CAPABILITIES, None):  # another model is not found by who answers
        body = {"prompt": "Once", "model": "huge"}
        assert isinstance(route(COMPLETIONS, body, served="tiny", capabilities=capabilities), CompletionRequest)


def test_neutral_values_stay_neutral() -> None:
    for name, values in COMPLETION_NEUTRAL.items():
        for value in values:
            assert isinstance(completion({name: value}), CompletionRequest)
    for name, values in CHAT_NEUTRAL.items():
        for value in values:
            assert isinstance(chat({name: value}), ChatRequest)


SGLANG = replace(FAKE_CAPABILITIES, name="sglang", engine_params=SGLANG_PARAMS, own_server=sglang_server(()))


def test_what_the_engines_server_would_ignore_is_refused_beside_what_only_it_does() -> None:
    body = {"prompt": "x", "include_stop_str_in_output": True}
    assert isinstance(route(COMPLETIONS, body, served="tiny", capabilities=SGLANG), CompletionRequest)
    with pytest.raises(ApiError, match="include_stop_str_in_output does not go together with n: ") as caught:
        route(COMPLETIONS, {**body, "n": 2}, served="tiny", capabilities=SGLANG)
    assert caught.value.param == "include_stop_str_in_output"
    assert route(COMPLETIONS, {"prompt": "x", "n": 2, "bad_words": []}, served="tiny", capabilities=SGLANG) == ToEngine(
        "n"
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "other"}, "model"),
        ({"model": "tiny:adapter"}, None),
        ({"prompt": [[1, 2], [3, 4096]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["one", "two"], "input": [{"role": "user"}]}, None),
        ({"label_token_ids": [10**6]}, "label_token_ids"),
        ({"max_tokens": 10**6, "seed": 10**9}, None),
    ],
)
def test_what_would_mislead_or_end_the_engine_does_not_reach_its_server(
    body: dict[str, Any], param: str | None
) -> None:
    small = replace(SGLANG, vocab_size=4096)
    refused = pytest.raises(ApiError) if param else nullcontext()
    with refused as caught:
        refuse_unfit(body, served="tiny", capabilities=small)
    if caught is not None:
        assert caught.value.param == param
    refuse_unfit(body, served="tiny", capabilities=VLLM)  # it looks at all of that itself
