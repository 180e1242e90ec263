"""What real SGLang's own server answers, through the daemon's HTTP API, and what its processes show of themselves."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from engines.served.group import members_of
from engines.sglang.adapter import SglangEngine
from engines.sglang.own_server import ELSEWHERE, own_server
from tests.contract.contract_requests import request_of
from tests.sglang.conftest import ENV, Shared
from tests.support.listening import listening_beyond_loopback
from tests.support.own_routes import ANSWER, FORMAT, TOOL, WORD, Api, api_before
from tests.support.until import until
from tests.support.vllm import llama

pytestmark = [
    pytest.mark.engine,
    pytest.mark.sglang,
    pytest.mark.real_loop,
    pytest.mark.asyncio(loop_scope="session"),
]


# As Qwen2.5 says it, which is what TOOLS has SGLang read.
CALL = '<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call>'


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def api(shared: Shared) -> AsyncIterator[Api]:
    async with api_before(shared.engine, model=llama()) as api:
        yield api


class TestOwnServer:
    async def test_the_names_are_those_of_this_sglang(self, api: Api) -> None:
        own = own_server(())
        assert await api.names("CompletionRequest") == own.completion_parameters | ELSEWHERE
        assert await api.names("ChatCompletionRequest") == own.chat_parameters | ELSEWHERE

    async def test_several_choices_with_log_probabilities(self, api: Api) -> None:
        # no seed, so that two answers differ: what is drawn at times is the end, which must not count here
        asked = {"n": 2, "logprobs": 3, "temperature": 1, "ignore_eos": True}
        answer = await api.completion(**asked)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert len({choice["text"] for choice in answer["choices"]}) == 2
        for choice in answer["choices"]:
            assert len(choice["logprobs"]["token_logprobs"]) == 8
        again = await api.completion(**asked)
        assert again["choices"][0]["text"] != answer["choices"][0]["text"]

    async def test_greedy_text_is_the_same_by_either_way(self, api: Api) -> None:
        ours, theirs = await api.completion(), await api.completion(return_token_ids=True)
        assert theirs["choices"][0]["text"] == ours["choices"][0]["text"]
        ours, theirs = await api.chat(), await api.chat(logprobs=True, top_logprobs=2)
        content = ours["choices"][0]["message"]["content"].rstrip("\N{REPLACEMENT CHARACTER}")
        assert theirs["choices"][0]["message"]["content"].rstrip("\N{REPLACEMENT CHARACTER}") == content
        assert len(theirs["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
        assert theirs["usage"]["prompt_tokens"] == ours["usage"]["prompt_tokens"]

    async def test_a_stream_says_what_the_whole_answer_says(self, api: Api) -> None:
        body = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        events = await api.events("/v1/completions", body)
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        assert text == (await api.completion(return_token_ids=True))["choices"][0]["text"]

    async def test_structured_output(self, api: Api) -> None:
        answer = await api.chat(response_format=FORMAT)
        assert json.loads(answer["choices"][0]["message"]["content"]) in ANSWER["enum"]
        answer = await api.completion(regex="(yes|no)")
        assert answer["choices"][0]["text"] in ("yes", "no")

    async def test_a_tool_that_must_be_called_is_called(self, api: Api) -> None:
        answer = await api.chat(tools=[TOOL], tool_choice="required", max_tokens=200)
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "paint"
        assert json.loads(call["function"]["arguments"])["colour"] in ANSWER["enum"]

    async def test_the_parser_that_arguments_name_finds_a_call(self, api: Api) -> None:
        """A model that is not trained for it calls a tool when it can say nothing else."""
        tool = {"type": "function", "function": {**TOOL["function"], "strict": False}}
        only = {"tools": [tool], "regex": re.escape(CALL), "max_tokens": 200}
        message = (await api.chat(**only))["choices"][0]["message"]
        assert [call["function"] for call in message["tool_calls"]] == [
            {"name": "paint", "arguments": json.dumps({"colour": "red"})}
        ]
        assert not message["content"]
        messages = {"messages": [{"role": "user", "content": "Which colour?"}], "temperature": 0}
        events = await api.events("/v1/chat/completions", {**messages, **only})
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
        assert "".join(call.get("name") or "" for call in calls) == "paint"
        assert json.loads("".join(call.get("arguments") or "" for call in calls)) == {"colour": "red"}

    async def test_further_routes(self, api: Api) -> None:
        status, answer = await api.post("/tokenize", {"prompt": "Once"})
        assert (status, answer["tokens"]) == (200, list(await api.backend.text.encode("Once")))
        status, answer = await api.post("/detokenize", {"tokens": answer["tokens"]})
        assert (status, answer["prompt"]) == (200, "<|begin|>Once")
        status, answer = await api.post("/v1/embeddings", {"input": "x"})
        assert (status, "embedding model" in answer["message"]) == (400, True)  # the model generates
        status, answer = await api.post("/pooling", {"input": "x"})
        assert (status, answer["error"]["code"]) == (404, "no_such_route")

    @pytest.mark.parametrize(
        ("path", "body", "param"),
        [
            ("/v1/completions", {"prompt": [[5], [10**6]], "max_tokens": 2}, "prompt"),
            ("/v1/completions", {"prompt": [5, -1], "n": 2, "max_tokens": 2}, "prompt"),
            ("/v1/completions", {"prompt": [5, "1000000"], "n": 2, "max_tokens": 2}, "prompt"),
            (
                "/v1/completions",
                {"prompt": [5], "regex": "yes|no", "min_tokens": 1, "stop_token_ids": [10**6]},
                "stop_token_ids",
            ),
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "x"}], "input_ids": [10**6]},
                "input_ids",
            ),
            ("/v1/embeddings", {"input": [10**6]}, "input"),
            ("/v1/score", {"query": [5], "items": [[10**6]], "label_token_ids": [5]}, "items"),
            ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ],
    )
    async def test_a_token_id_out_of_range_does_not_reach_it(
        self, api: Api, path: str, body: dict[str, Any], param: str
    ) -> None:
        status, answer = await api.post(path, body)
        assert (status, answer["error"]["param"]) == (400, param)
        assert len((await api.completion(return_token_ids=True))["choices"]) == 1  # it lives

    async def test_other_models_are_refused_and_its_own_words_come_back(self, api: Api) -> None:
        for path, body in (("/v1/completions", {"prompt": "x", "n": 2}), ("/v1/embeddings", {"input": "x"})):
            status, answer = await api.post(path, {**body, "model": "other"})
            assert (status, answer["error"]["code"]) == (404, "model_not_found")
        status, answer = await api.post("/v1/completions", {"prompt": "x", "n": 2, "include_stop_str_in_output": True})
        assert (status, answer["error"]["param"]) == (400, "include_stop_str_in_output")
        chat = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}
        unknown = {"tool_choice": {"type": "function", "function": {"name": "sing"}}}
        status, answer = await api.post("/v1/chat/completions", chat | unknown)
        assert (status, "sing" in answer["message"]) == (400, True)

    async def test_a_client_that_leaves_has_its_request_aborted(self, api: Api) -> None:
        body = {"prompt": [5], "n": 2, "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with api.session.post(f"{api.url}/v1/completions", json=body) as response:
            await response.content.readuntil(b"\n\n")
            assert (await api.engine.counters()).running > 0
            response.close()
        await api.becomes_idle()

    async def test_a_drain_waits_for_them(self, api: Api) -> None:
        asking = asyncio.create_task(api.completion(n=2, temperature=1, max_tokens=60, ignore_eos=True))

        async def is_running() -> bool:
            return (await api.engine.counters()).running > 0

        await until(is_running)
        await api.engine.drain()
        assert (await asking)["usage"]["completion_tokens"] == 120


class TestParameters:
    async def test_a_bias_forces_a_token_and_min_tokens_hold_the_end_back(self, api: Api) -> None:
        answer = await api.completion(logit_bias={str(await api.token(WORD)): 100})
        assert answer["choices"][0]["text"] == WORD * 8
        (eos, *_) = api.engine.capabilities.eos_token_ids
        for extra, tokens in (({}, 1), ({"min_tokens": 5}, 6)):
            answer = await api.completion(logit_bias={str(eos): 100}, **extra)
            assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (tokens, "stop")

    @pytest.mark.parametrize("bound", [{"min_p": 1.0}, {"top_k": 1}, {"top_p": 1e-6}])
    async def test_a_bound_on_what_may_be_drawn_leaves_the_likeliest(self, api: Api, bound: dict[str, float]) -> None:
        greedy, free = await api.completion(), await api.completion(temperature=1, seed=3)
        drawn = await api.completion(temperature=1, seed=3, **bound)
        assert drawn["choices"][0]["text"] == greedy["choices"][0]["text"] != free["choices"][0]["text"]

    @pytest.mark.parametrize("penalty", [{"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 2}])
    async def test_a_penalty_changes_what_is_said_again(self, api: Api, penalty: dict[str, float]) -> None:
        free, held = await api.completion(max_tokens=120), await api.completion(max_tokens=120, **penalty)
        assert held["choices"][0]["text"] != free["choices"][0]["text"]

    @pytest.mark.parametrize(
        ("extra", "param"),
        [
            ({"min_p": "a"}, "min_p"),
            ({"allowed_token_ids": [5]}, "allowed_token_ids"),
            ({"logit_bias": {"1000000": 1}}, "logit_bias"),
            ({"repetition_penalty": 3}, "repetition_penalty"),
            ({"min_tokens": 9}, "min_tokens"),
            ({"mox_tokens": 9}, "mox_tokens"),
        ],
    )
    async def test_wrong_ones_are_refused_by_name(self, api: Api, extra: dict[str, Any], param: str) -> None:
        status, answer = await api.post("/v1/completions", {"prompt": [5], "max_tokens": 8, **extra})
        assert (status, answer["error"]["param"]) == (400, param)


class TestProcesses:
    async def test_nothing_listens_on_anything_but_loopback(self, engine: SglangEngine) -> None:
        pids = members_of(engine.pids["api"])
        assert len(pids) >= 4  # API server, detokenizer, two schedulers
        assert await asyncio.to_thread(listening_beyond_loopback, pids) == []

    async def test_all_have_the_environment_of_the_configuration(self, shared: Shared) -> None:
        pids = shared.engine.pids
        for pid in (pids["api"], *pids["workers"], *pids["detokenizers"]):
            has = (Path("/proc") / str(pid) / "environ").read_bytes().decode().split("\0")
            assert {f"{name}={value}" for name, value in ENV.items()} <= set(has)
        begun = [line for line in shared.log if "Memory pool end" in line.message]
        assert {line.process for line in begun} == {"PP0", "PP1"}  # understood in the form that ENV asks for, too

    async def test_what_computes_is_as_nice_as_it_is_configured_to_be(self, engine: SglangEngine) -> None:
        nice = {pid: os.getpriority(os.PRIO_PROCESS, pid) for pid in engine.pids["workers"]}
        ours = os.getpriority(os.PRIO_PROCESS, 0)  # what they begin with
        assert set(nice.values()) == {max(ours, engine.options.nice)}

    async def test_its_routes_ask_for_keys_that_only_the_daemon_has(self, engine: SglangEngine) -> None:
        connector = aiohttp.UnixConnector(str(engine.own_routes_socket))
        async with aiohttp.ClientSession("http://sglang", connector=connector) as session:
            for key, route in (("", "/v1/tokenize"), ("wrong", "/generate"), (engine.own_routes_key, "/freeze_gc")):
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                async with session.post(route, json={"prompt": "x", "text": "x"}, headers=headers) as answer:
                    assert answer.status in (401, 403), route

    async def test_requests_of_all_micro_batches_count(self, engine: SglangEngine) -> None:
        """SGLang's own load shows those of one micro-batch under pipeline parallelism."""
        before = await engine.counters()
        begun = [asyncio.Event() for _ in range(6)]

        async def read(index: int) -> None:
            async for _chunk in engine.generate(request_of((5, 6, 7 + index), max_tokens=150)):
                begun[index].set()

        reading = [asyncio.create_task(read(index)) for index in range(len(begun))]
        await asyncio.gather(*(event.wait() for event in begun))
        during = await engine.counters()
        assert (during.running, during.waiting) == (6, 0)
        await asyncio.gather(*reading)
        after = await engine.counters()
        assert after.generated_tokens_total - before.generated_tokens_total == 6 * 150
        assert after.prompt_tokens_total - before.prompt_tokens_total == 6 * 3
