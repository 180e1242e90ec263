"""Requests that do not say how they are sampled are sampled as the model's makers want it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from engines.protocol import GenerationRequest, SamplingParams
from flexpiped.api.sampling_defaults import sampling_defaults, with_defaults
from tests.support.http_app import CAPABILITIES, EOS_ID, FakeEngines, http_app

QWEN: Mapping[str, object] = {  # of Qwen2.5-0.5B-Instruct
    "bos_token_id": 151643,
    "do_sample": True,
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
}
PENALISING = replace(CAPABILITIES, engine_params=frozenset({"repetition_penalty"}))


def test_only_what_is_about_sampling_is_taken() -> None:
    assert sampling_defaults(QWEN) == {"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    assert sampling_defaults({"eos_token_id": 1, "temperature": None, "max_length": 20, "do_sample": False}) == {}
    further = {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    assert sampling_defaults({**further, "max_new_tokens": 512}) == {**further, "max_tokens": 512}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"top_p": 0.0}, "top_p must be"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
    ],
)
def test_what_a_request_could_not_give_is_refused_by_name(config: Mapping[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=rf"generation_config\.json: .*{words}"):
        sampling_defaults(config)


def test_a_request_has_the_last_word_and_an_engine_is_asked_for_nothing_it_has_not() -> None:
    defaults = sampling_defaults(QWEN)
    body = {"prompt": "x", "temperature": 0, "top_p": None}
    asked = {"prompt": "x", "temperature": 0, "top_p": 0.8, "top_k": 20}
    assert with_defaults(body, defaults, CAPABILITIES) == asked
    assert with_defaults(body, defaults, PENALISING) == asked | {"repetition_penalty": 1.1}
    assert with_defaults(body, {}, PENALISING) is body


@pytest.mark.real_loop
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_the_engine_is_asked_for_them(route: str) -> None:
    asked: list[SamplingParams] = []

    def note(request: GenerationRequest, _position: int) -> int:
        asked.append(request.sampling)
        return 5

    engines = FakeEngines(next_token=note, capabilities=PENALISING)
    given: dict[str, Any] = {"max_tokens": 1, "top_k": 3}
    given |= {"prompt": "x"} if route == "completions" else {"messages": [{"role": "user", "content": "x"}]}
    async with http_app(engines=engines, sampling_defaults=sampling_defaults(QWEN)) as app:
        async with aiohttp.ClientSession() as session, session.post(f"{app.url}/v1/{route}", json=given) as response:
            assert response.status == 200
        await app.becomes_idle()
    assert {(each.temperature, each.top_p, each.top_k) for each in asked} == {(0.7, 0.8, 3)}
    assert [each.engine_params for each in asked] == [{"repetition_penalty": 1.1}] * len(asked)


@pytest.mark.real_loop
async def test_a_chat_has_so_many_tokens_and_a_completion_as_many_as_ever() -> None:
    """As with vLLM's server; no more than the context has room for."""
    asked: list[int] = []

    def note(request: GenerationRequest, _position: int) -> int:
        asked.append(request.sampling.max_tokens)
        return EOS_ID

    chat = {"messages": [{"role": "user", "content": "x"}]}
    for of_the_model, given, wanted in (
        (20, chat, 20),
        (20, {**chat, "max_tokens": 30}, 30),
        (20, {"prompt": "x"}, 16),
        (10**6, {**chat, "max_completion_tokens": 5}, 5),
    ):
        defaults = sampling_defaults({"max_new_tokens": of_the_model})
        async with http_app(engines=FakeEngines(next_token=note), sampling_defaults=defaults) as app:
            route = "completions" if "prompt" in given else "chat/completions"
            async with aiohttp.ClientSession(app.url) as session, session.post(f"/v1/{route}", json=given) as response:
                assert response.status == 200
            await app.becomes_idle()
        assert asked.pop() == wanted
