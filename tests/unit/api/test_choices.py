"""Several answers to one request, and what is told of their tokens: over a real socket, with the fake engine."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from engines.fake_batch import logprob_of
from engines.protocol import GenerationRequest
from engines.text.local import LocalText, PlainTokenizer
from flexpiped.api.errors import ApiError
from flexpiped.api.parameters import parse_chat, parse_completion
from tests.support.http_app import CAPABILITIES, EOS_ID, RICH, FakeEngines, HttpApp, http_app, ids_of, saying
from tests.support.tiny_tokenizer import byte_level_tokenizer

pytestmark = pytest.mark.real_loop
TEXTS = ("Once upon a time", "The quick brown fox", "A lazy dog")
TOKENIZER = byte_level_tokenizer()
SEED = 7  # of requests that give none, in these tests


def by_seed(request: GenerationRequest, position: int) -> int:
    """Spell another text for each of three seeds in a row."""
    return saying(TEXTS[(request.sampling.seed - SEED) % len(TEXTS)])(request, position)


@pytest.fixture
async def app() -> AsyncIterator[HttpApp]:
    async with http_app(engines=FakeEngines(next_token=by_seed, capabilities=RICH)) as app:
        yield app
        await app.becomes_idle()


async def whole(app: HttpApp, session: aiohttp.ClientSession, path: str, **body: Any) -> dict[str, Any]:
    async with session.post(f"{app.url}/v1/{path}", json=body) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
    return answer


async def events(app: HttpApp, session: aiohttp.ClientSession, path: str, **body: Any) -> list[dict[str, Any]]:
    async with session.post(f"{app.url}/v1/{path}", json=body | {"stream": True}) as response:
        *found, done, rest = (await response.text()).split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event[6:]) for event in found]


CHAT = [{"role": "user", "content": "hello"}]


async def test_n_choices_are_those_of_n_seeds_in_a_row(app: HttpApp, session: aiohttp.ClientSession) -> None:
    answer = await whole(app, session, "completions", prompt="x", n=3, max_tokens=200)
    assert [(each["index"], each["text"]) for each in answer["choices"]] == list(enumerate(TEXTS))
    assert {each["finish_reason"] for each in answer["choices"]} == {"stop"}
    assert answer["usage"]["completion_tokens"] == sum(len(ids_of(text)) + 1 for text in TEXTS)
    assert answer["usage"]["prompt_tokens"] == len(TOKENIZER.encode("x").ids)
    chat = await whole(app, session, "chat/completions", messages=CHAT, n=2, seed=SEED + 1)
    assert [each["message"]["content"] for each in chat["choices"]] == [TEXTS[1], TEXTS[2]]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_streamed_choices_have_their_index(app: HttpApp, session: aiohttp.ClientSession, path: str) -> None:
    asked = {"prompt": "x", "max_tokens": 200} if path == "completions" else {"messages": CHAT}
    found = await events(app, session, path, n=3, stream_options={"include_usage": True}, **asked)
    texts, ends = ["", "", ""], [0, 0, 0]
    for event in found[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
        ends[choice["index"]] += choice["finish_reason"] == "stop"
    assert tuple(texts) == TEXTS
    assert ends == [1, 1, 1]
    assert found[-1]["usage"]["completion_tokens"] == sum(len(ids_of(text)) + 1 for text in TEXTS)
    if path != "completions":
        roles = [event["choices"][0]["index"] for event in found[:3]]
        assert (roles, found[0]["choices"][0]["delta"]["role"]) == ([0, 1, 2], "assistant")


async def test_one_choice_may_end_while_others_go_on(app: HttpApp, session: aiohttp.ClientSession) -> None:
    answer = await whole(app, session, "completions", prompt="x", n=3, max_tokens=200, stop=" brown")
    assert [each["text"] for each in answer["choices"]] == [TEXTS[0], "The quick", TEXTS[2]]


async def test_several_prompts_have_their_choices_in_a_row(app: HttpApp, session: aiohttp.ClientSession) -> None:
    answer = await whole(app, session, "completions", prompt=["One", "Two"], n=2, max_tokens=60, echo=True)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == ["One" + TEXTS[0], "One" + TEXTS[1], "Two" + TEXTS[0], "Two" + TEXTS[1]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 2 + len(ids_of("One")) + len(
        ids_of("Two")
    )  # each with the token of the beginning
    assert answer["usage"]["completion_tokens"] == 2 * sum(len(ids_of(text)) + 1 for text in TEXTS[:2])


async def test_the_best_is_chosen_for_each_prompt(app: HttpApp, session: aiohttp.ClientSession) -> None:
    (one,) = (await whole(app, session, "completions", prompt="One", best_of=3, max_tokens=60))["choices"]
    answer = await whole(app, session, "completions", prompt=["One", "One"], best_of=3, max_tokens=60)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, one["text"]), (1, one["text"])]


async def test_several_prompts_are_streamed_side_by_side(app: HttpApp, session: aiohttp.ClientSession) -> None:
    body = {"prompt": ["One", "Two"], "max_tokens": 60, "stream_options": {"include_usage": True}}
    found = await events(app, session, "completions", **body)
    texts = {0: "", 1: ""}
    for choice in (each for event in found for each in event["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == {0: TEXTS[0], 1: TEXTS[0]}
    assert found[-1]["usage"]["prompt_tokens"] == 2 + len(ids_of("One")) + len(
        ids_of("Two")
    )  # each with the token of the beginning


@pytest.mark.parametrize(
    ("extra", "reason"),
    [({"stop": ["x", "upon"]}, "upon"), ({"stop_token_ids": [ids_of(TEXTS[0])[3]]}, None), ({}, None)],
)
async def test_the_stop_reason_is_what_the_request_named(
    app: HttpApp, session: aiohttp.ClientSession, extra: dict[str, Any], reason: str | None
) -> None:
    wanted = extra.get("stop_token_ids", [reason])[0]
    answer = await whole(app, session, "completions", prompt="One", max_tokens=60, **extra)
    assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["stop_reason"]) == ("stop", wanted)
    found = await events(app, session, "chat/completions", messages=CHAT, max_tokens=60, **extra)
    assert found[-1]["choices"][0]["stop_reason"] == wanted


async def test_the_models_own_end_is_no_stop_reason_though_the_request_names_it(
    app: HttpApp, session: aiohttp.ClientSession
) -> None:
    asked = {"prompt": "One", "max_tokens": 60, "stop_token_ids": [EOS_ID]}
    (by_itself,) = (await whole(app, session, "completions", **asked))["choices"]
    (as_asked,) = (await whole(app, session, "completions", **asked, ignore_eos=True))["choices"]
    assert (by_itself["text"], by_itself["stop_reason"]) == (TEXTS[0], None)
    assert (as_asked["text"], as_asked["stop_reason"]) == (TEXTS[0], EOS_ID)


async def test_a_stop_token_is_text_where_what_stops_is_included(app: HttpApp, session: aiohttp.ClientSession) -> None:
    before, stop = ids_of(TEXTS[0])[:3], ids_of(TEXTS[0])[3]
    asked = {"prompt": "One", "max_tokens": 60, "stop_token_ids": [stop]}
    (without,) = (await whole(app, session, "completions", **asked))["choices"]
    assert without["text"] == TOKENIZER.decode(before)
    (included,) = (await whole(app, session, "completions", **asked, include_stop_str_in_output=True))["choices"]
    assert (included["text"], included["stop_reason"]) == (TOKENIZER.decode([*before, stop]), stop)
    body = {"prompt": "One", "max_tokens": 60, "include_stop_str_in_output": True}
    assert (await whole(app, session, "completions", **body))["choices"][0]["text"] == TEXTS[0]


async def test_best_of_gives_the_likeliest_and_counts_all(app: HttpApp, session: aiohttp.ClientSession) -> None:
    def mean(text: str) -> float:
        tokens = [*ids_of(text), EOS_ID]
        return sum(map(logprob_of, tokens)) / len(tokens)

    answer = await whole(app, session, "completions", prompt="x", n=2, best_of=3, max_tokens=200)
    best = sorted(TEXTS, key=mean, reverse=True)[:2]
    assert [(each["index"], each["text"]) for each in answer["choices"]] == list(enumerate(best))
    assert answer["usage"]["completion_tokens"] == sum(len(ids_of(text)) + 1 for text in TEXTS)
    assert [each["logprobs"] for each in answer["choices"]] == [None, None]


async def test_a_client_that_leaves_ends_every_choice(session: aiohttp.ClientSession) -> None:
    engines = FakeEngines(next_token=saying("", then=[40]), step_s=0.01)
    async with http_app(engines=engines) as app:
        body = {"prompt": "x", "n": 5, "max_tokens": 200, "stream": True}
        async with session.post(f"{app.url}/v1/completions", json=body) as response:
            await response.content.readline()
            assert (await engines.last.counters()).running == 5
        await app.becomes_idle(within_s=1.0)


async def test_a_death_of_the_engine_changes_no_choice(session: aiohttp.ClientSession) -> None:
    engines = FakeEngines()

    def with_a_death(request: GenerationRequest, position: int) -> int:
        if position == 4 and len(engines.made) == 1:
            engines.last.kill("killed by the test")
        return by_seed(request, position)

    engines.next_token = with_a_death
    async with http_app(engines=engines) as app:
        answer = await whole(app, session, "completions", prompt="x", n=3, max_tokens=200)
        assert len(engines.made) == 2
    assert [each["text"] for each in answer["choices"]] == list(TEXTS)


async def test_logprobs_of_completions(app: HttpApp, session: aiohttp.ClientSession) -> None:
    answer = await whole(app, session, "completions", prompt="x", logprobs=2, max_tokens=200)
    (choice,) = answer["choices"]
    token_ids = [*ids_of(TEXTS[0]), EOS_ID]
    told = choice["logprobs"]
    assert told["tokens"] == [TOKENIZER.decode([token_id], skip_special_tokens=False) for token_id in token_ids]
    assert "".join(told["tokens"][:-1]) == choice["text"]
    assert told["token_logprobs"] == [logprob_of(token_id) for token_id in token_ids]
    assert told["text_offset"] == [len("".join(told["tokens"][:i])) for i in range(len(token_ids))]
    assert told["top_logprobs"][0][told["tokens"][0]] == logprob_of(token_ids[0])
    assert len(told["top_logprobs"][0]) == 2
    alone = await whole(app, session, "completions", prompt="x", logprobs=0, max_tokens=200)
    assert [len(each) for each in alone["choices"][0]["logprobs"]["top_logprobs"]] == [1] * len(token_ids)
    without = await whole(app, session, "completions", prompt="x", logprobs=False, max_tokens=200)
    assert without["choices"][0]["logprobs"] is None
    nothing = await whole(app, session, "completions", prompt="x", logprobs=1, max_tokens=200, stop=TEXTS[0][:2])
    assert nothing["choices"][0]["text"] == ""
    assert nothing["choices"][0]["logprobs"]["tokens"] == []


async def test_logprobs_of_chats(app: HttpApp, session: aiohttp.ClientSession) -> None:
    answer = await whole(app, session, "chat/completions", messages=CHAT, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(each["token"] for each in content[:-1]) == TEXTS[0]
    assert all(bytes(each["bytes"]).decode() == each["token"] for each in content)
    assert all(each["top_logprobs"][0]["logprob"] == each["logprob"] for each in content)
    assert {len(each["top_logprobs"]) for each in content} == {2}
    plain = await whole(app, session, "chat/completions", messages=CHAT, logprobs=True)
    assert {len(each["top_logprobs"]) for each in plain["choices"][0]["logprobs"]["content"]} == {0}


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_streamed_logprobs_are_those_of_the_whole(
    app: HttpApp, session: aiohttp.ClientSession, path: str
) -> None:
    asked: dict[str, Any] = {"n": 3}
    asked |= (
        {"prompt": "x", "max_tokens": 200, "logprobs": 2}
        if path == "completions"
        else {"messages": CHAT, "logprobs": True, "top_logprobs": 2}
    )
    answer = await whole(app, session, path, **asked)
    found = await events(app, session, path, **asked)
    for index, choice in enumerate(answer["choices"]):
        parts = [
            event["choices"][0]["logprobs"]
            for event in found
            if event["choices"][0]["index"] == index and event["choices"][0]["logprobs"]
        ]
        for name, expected in choice["logprobs"].items():
            if expected is not None:
                assert [each for part in parts for each in part[name]] == expected


@pytest.mark.parametrize("stop", ["quick", "ick b", "e q"])
async def test_no_token_of_a_stop_string_is_told(session: aiohttp.ClientSession, stop: str) -> None:
    engines = FakeEngines(next_token=saying(TEXTS[1]), capabilities=RICH)
    async with http_app(engines=engines) as app:
        asked: dict[str, Any] = {"prompt": "x", "logprobs": 1, "max_tokens": 200, "stop": stop}
        answer = await whole(app, session, "completions", **asked)
        (choice,) = answer["choices"]
        told = "".join(choice["logprobs"]["tokens"])
        assert choice["text"] == TEXTS[1].partition(stop)[0]
        assert choice["text"].startswith(told)
        found = await events(app, session, "completions", **asked)
        parts = [event["choices"][0]["logprobs"] for event in found if event["choices"][0]["logprobs"]]
        assert "".join(token for part in parts for token in part["tokens"]) == told
        await app.becomes_idle()


async def test_stop_strings_wait_for_min_tokens(app: HttpApp, session: aiohttp.ClientSession) -> None:
    asked: dict[str, Any] = {"prompt": "x", "max_tokens": 200, "stop": "n"}
    assert (await whole(app, session, "completions", **asked))["choices"][0]["text"] == "O"
    count = len(ids_of("Once"))
    answer = await whole(app, session, "completions", min_tokens=count, **asked)
    assert answer["choices"][0]["text"] == "Once upo"


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_gives_the_prompt_with_its_log_probabilities(
    app: HttpApp, session: aiohttp.ClientSession, stream: bool
) -> None:
    asked: dict[str, Any] = {"prompt": "hello, you", "echo": True, "n": 2, "max_tokens": 3, "logprobs": 1}
    prompt_ids = TOKENIZER.encode("hello, you").ids
    if stream:
        parts = [each["choices"][0] for each in await events(app, session, "completions", **asked)]
        texts = ["".join(each["text"] for each in parts if each["index"] == i) for i in range(2)]
        told = [each["logprobs"] for each in parts if each["index"] == 1 and each["logprobs"]]
        logprobs = {name: [value for part in told for value in part[name]] for name in told[0]}
    else:
        choices = (await whole(app, session, "completions", **asked))["choices"]
        texts, logprobs = [each["text"] for each in choices], choices[1]["logprobs"]
    spelt = [TOKENIZER.decode(ids_of(text)[:3]) for text in TEXTS]
    assert texts == ["hello, you" + spelt[0], "hello, you" + spelt[1]]
    assert logprobs["token_logprobs"] == [
        None,
        *map(logprob_of, prompt_ids[1:]),
        *map(logprob_of, ids_of(TEXTS[1])[:3]),
    ]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"][0] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_without_output_scores_the_prompt(
    app: HttpApp, session: aiohttp.ClientSession, stream: bool
) -> None:
    asked: dict[str, Any] = {"prompt": "hello, you", "echo": True, "max_tokens": 0, "logprobs": 1}
    prompt_ids = TOKENIZER.encode("hello, you").ids
    if stream:
        found = await events(app, session, "completions", **asked, stream_options={"include_usage": True})
        choice, usage = found[0]["choices"][0], found[-1]["usage"]
        assert len(found) == 2
    else:
        answer = await whole(app, session, "completions", **asked)
        choice, usage = answer["choices"][0], answer["usage"]
    assert (choice["text"], choice["finish_reason"]) == ("hello, you", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, *map(logprob_of, prompt_ids[1:])]
    assert usage == {"prompt_tokens": len(prompt_ids), "completion_tokens": 0, "total_tokens": len(prompt_ids)}


async def test_echo_of_tokens_without_log_probabilities(app: HttpApp, session: aiohttp.ClientSession) -> None:
    token_ids = list(ids_of("hello"))
    answer = await whole(app, session, "completions", prompt=token_ids, echo=True, max_tokens=200)
    assert answer["choices"][0]["text"] == "hello" + TEXTS[0]
    assert answer["choices"][0]["logprobs"] is None


async def test_prompt_logprobs(app: HttpApp, session: aiohttp.ClientSession) -> None:
    token_ids = list(ids_of("hello there"))
    answer = await whole(app, session, "completions", prompt=token_ids, prompt_logprobs=1, max_tokens=2)
    first, *others = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert [list(each) for each in others] == [[str(token_id)] for token_id in token_ids[1:]]
    assert others[0][str(token_ids[1])] == {
        "logprob": logprob_of(token_ids[1]),
        "rank": 1,
        "decoded_token": TOKENIZER.decode([token_ids[1]]),
    }
    chat = await whole(app, session, "chat/completions", messages=CHAT, prompt_logprobs=0, max_tokens=2)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


async def test_bad_words_reach_the_engine_as_tokens(session: aiohttp.ClientSession) -> None:
    asked: list[GenerationRequest] = []

    def remember(request: GenerationRequest, _position: int) -> int:
        asked.append(request)
        return EOS_ID

    async with http_app(engines=FakeEngines(next_token=remember, capabilities=RICH)) as app:
        await whole(app, session, "completions", prompt="x", bad_words=[" over", "z"])
    assert asked[0].sampling.engine_params == {"bad_words": [" over", "z"]}
    bare, spaced, letter = ids_of("over"), ids_of(" over"), ids_of("z")
    assert bare in asked[0].sampling.bad_words
    assert letter in asked[0].sampling.bad_words
    assert (spaced in asked[0].sampling.bad_words) is (len(spaced) == len(bare) and spaced[0] != bare[0])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_contradictions_of_completions_are_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion({"prompt": "x", **body}, taken={"n", "best_of", "prompt_logprobs"})
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, "contradiction")


def test_top_logprobs_of_chats_need_logprobs() -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat({"messages": CHAT, "top_logprobs": 2}, taken={"logprobs", "top_logprobs"})
    assert (caught.value.param, caught.value.code) == ("top_logprobs", "contradiction")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("best_of", 0),
        ("echo", 1),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", -1),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion({"prompt": "x", name: value}, taken={name})
    assert (caught.value.status, caught.value.param) == (400, name)


async def test_an_engine_without_them_refuses_log_probabilities(session: aiohttp.ClientSession) -> None:
    plain = replace(CAPABILITIES, top_logprobs=False)
    text = LocalText(PlainTokenizer(TOKENIZER))
    async with (
        http_app(engines=FakeEngines(next_token=by_seed, capabilities=plain), text=text) as app,
        session.post(f"{app.url}/v1/completions", json={"prompt": "x", "logprobs": 1}) as response,
    ):
        assert (response.status, (await response.json())["error"]["param"]) == (400, "logprobs")
