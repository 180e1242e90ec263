"""vLLM's sampling parameters and its own routes, through the daemon's HTTP API."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from engines.vllm.adapter import VllmEngine
from engines.vllm.own_server import own_server
from tests.support.own_routes import ANSWER, FORMAT, OTHER, TOOL, WORD, Api, api_before
from tests.support.until import until
from tests.support.vllm import llama

pytestmark = [
    pytest.mark.engine,
    pytest.mark.vllm,
    pytest.mark.real_loop,
    pytest.mark.asyncio(loop_scope="session"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def api(engine: VllmEngine) -> AsyncIterator[Api]:
    async with api_before(engine, model=llama()) as api:
        yield api


async def test_the_names_are_those_of_this_vllm(api: Api) -> None:
    own = own_server(())
    assert await api.names("CompletionRequest") == own.completion_parameters
    assert await api.names("ChatCompletionRequest") == own.chat_parameters


# --- sampling parameters ---


async def test_allowed_token_ids_are_the_only_ones(api: Api) -> None:
    answer = await api.completion(allowed_token_ids=[await api.token(WORD)])
    assert answer["choices"][0]["text"] == WORD * 8


async def test_a_bias_forces_a_token(api: Api) -> None:
    answer = await api.completion(logit_bias={str(await api.token(WORD)): 100})
    assert answer["choices"][0]["text"] == WORD * 8


async def test_min_tokens_hold_the_end_back(api: Api) -> None:
    (eos, *_) = api.engine.capabilities.eos_token_ids
    for extra, tokens in (({}, 1), ({"min_tokens": 5}, 6)):
        answer = await api.completion(logit_bias={str(eos): 100}, **extra)
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (tokens, "stop")


async def test_a_bad_word_does_not_come(api: Api) -> None:
    answer = await api.completion(logit_bias={str(await api.token(WORD)): 100}, bad_words=[WORD])
    assert WORD not in answer["choices"][0]["text"]


async def test_min_p_of_one_leaves_the_likeliest(api: Api) -> None:
    greedy = await api.completion()
    drawn = await api.completion(temperature=1, min_p=1.0, seed=3)
    assert drawn["choices"][0]["text"] == greedy["choices"][0]["text"]


@pytest.mark.parametrize("penalty", [{"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 9}])
async def test_a_penalty_ends_a_repetition(api: Api, penalty: dict[str, float]) -> None:
    word, other = await api.token(WORD), await api.token(OTHER)
    favoured = {"allowed_token_ids": [word, other], "logit_bias": {str(word): 1.0}}
    assert (await api.completion(**favoured))["choices"][0]["text"] == WORD * 8
    assert OTHER in (await api.completion(**favoured, **penalty))["choices"][0]["text"]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"min_p": "a"}, "min_p"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"mox_tokens": 9}, "mox_tokens"),
    ],
)
async def test_wrong_ones_are_refused_by_name(api: Api, extra: dict[str, Any], param: str) -> None:
    status, answer = await api.post("/v1/completions", {"prompt": [5], "max_tokens": 8, **extra})
    assert (status, answer["error"]["param"]) == (400, param)


# --- vLLM's own routes ---


async def test_two_choices_with_log_probabilities(api: Api) -> None:
    answer = await api.completion(n=2, logprobs=3, temperature=1, seed=1, return_tokens_as_token_ids=True)
    assert answer["model"] == api.backend.model
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        assert len(choice["logprobs"]["token_logprobs"]) == 8
        assert all(3 <= len(top) <= 4 for top in choice["logprobs"]["top_logprobs"])


async def test_two_choices_as_a_stream(api: Api) -> None:
    body = {"prompt": "Once", "n": 2, "max_tokens": 5, "logprobs": 3, "ignore_eos": True}
    events = await api.events("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert {choice["index"] for event in events for choice in event["choices"]} == {0, 1}
    assert events[-1]["usage"]["completion_tokens"] == 10
    assert b'flexpiped_requests_total{endpoint="completions",outcome="done"}' in api.backend.metrics.render(None)


async def test_greedy_text_is_the_same_by_either_way(api: Api) -> None:
    ours, theirs = await api.completion(), await api.completion(return_token_ids=True)
    assert theirs["choices"][0]["text"] == ours["choices"][0]["text"]
    assert len(theirs["choices"][0]["token_ids"]) == 8
    ours, theirs = await api.chat(), await api.chat(logprobs=True, top_logprobs=2)
    # of a character that is cut off by the limit we show a replacement, vLLM shows nothing
    content = ours["choices"][0]["message"]["content"].rstrip("\N{REPLACEMENT CHARACTER}")
    assert theirs["choices"][0]["message"]["content"].rstrip("\N{REPLACEMENT CHARACTER}") == content
    assert len(theirs["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert theirs["usage"]["prompt_tokens"] == ours["usage"]["prompt_tokens"]


async def test_structured_output(api: Api) -> None:
    answer = await api.chat(response_format=FORMAT)
    assert json.loads(answer["choices"][0]["message"]["content"]) in ANSWER["enum"]
    answer = await api.completion(structured_outputs={"choice": ["yes", "no"]})
    assert answer["choices"][0]["text"] in ("yes", "no")


async def test_structured_output_as_a_stream(api: Api) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": FORMAT, "max_tokens": 40}
    events = await api.events("/v1/chat/completions", body)
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    assert json.loads(text) in ANSWER["enum"]


async def test_a_tool_that_is_chosen_is_called(api: Api) -> None:
    chosen = {"type": "function", "function": {"name": "paint"}}
    answer = await api.chat(tools=[TOOL], tool_choice=chosen, max_tokens=200)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "paint"
    assert json.loads(call["function"]["arguments"])["colour"] in ANSWER["enum"]


async def test_what_it_refuses_is_refused_in_its_words(api: Api) -> None:
    messages = [{"role": "user", "content": "x"}]
    unknown = {"type": "function", "function": {"name": "sing"}}
    body = {"messages": messages, "tools": [TOOL], "tool_choice": unknown}
    status, answer = await api.post("/v1/chat/completions", body)
    assert (status, answer["error"]["type"]) == (400, "BadRequestError")
    status, answer = await api.post("/v1/chat/completions", {"messages": messages, "chat_template": "x"})
    assert (status, "--trust-request-chat-template" in answer["error"]["message"]) == (400, True)
    status, answer = await api.post("/v1/completions", {"prompt": "x", "n": -1})
    assert status == 400
    status, answer = await api.post("/v1/completions", {"prompt": "x", "model": "adapter"})
    assert (status, "adapter" in answer["error"]["message"]) == (404, True)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/classify", "/rerank"])
async def test_routes_that_it_has_for_other_models_are_refused_with_the_reason(api: Api, path: str) -> None:
    status, answer = await api.post(path, {"input": "x"})
    assert (status, answer["error"]["code"]) == (404, "no_such_route")
    assert "generates, and the vllm engine's own server has no such route for it" in answer["error"]["message"]


async def test_further_routes(api: Api) -> None:
    status, answer = await api.post("/tokenize", {"prompt": "Once"})
    assert (status, answer["tokens"]) == (200, list(await api.backend.text.encode("Once")))
    status, answer = await api.post("/detokenize", {"tokens": [await api.token(WORD)] * 2})
    assert (status, answer["prompt"]) == (200, WORD * 2)
    status, answer = await api.post("/v1/responses", {"input": "x", "max_output_tokens": 4})
    assert (status, answer["object"]) == (200, "response")


async def test_a_client_that_leaves_has_its_request_aborted(api: Api) -> None:
    body = {"prompt": [5], "n": 2, "max_tokens": 400, "ignore_eos": True, "stream": True}
    async with api.session.post(f"{api.url}/v1/completions", json=body) as response:
        await response.content.readuntil(b"\n\n")
        assert (await api.engine.counters()).running > 0
        response.close()
    before = (await api.engine.counters()).generated_tokens_total
    await api.becomes_idle()
    assert (await api.engine.counters()).generated_tokens_total - before < 600


async def test_a_drain_waits_for_them(api: Api) -> None:
    asking = asyncio.create_task(api.completion(n=2, temperature=1, max_tokens=60, ignore_eos=True))

    async def is_running() -> bool:
        return (await api.engine.counters()).running > 0

    await until(is_running)
    await api.engine.drain()
    answer = await asking
    assert answer["usage"]["completion_tokens"] == 120
