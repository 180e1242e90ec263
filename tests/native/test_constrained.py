"""Words that must not come, and how constrained output ends: over HTTP, while layers move and after a worker died."""

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
import pytest_asyncio
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.generation import logits_process as reference

from tests.support.daemon import ROOT, Daemon, started

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]

Json = dict[str, Any]
DEMO: Path = ROOT / "etc" / "demo-model"
PROMPT = "Once upon a time"
EOS_ID = 1
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ages": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "minItems": 2,
            "maxItems": 2,
        },
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}
PATTERN = r"[a-z]{5,9}-[0-9]{4} (yes|no)\. [é-ü€😀]{3}"
KINDS: Json = {
    "json": {"json": SCHEMA, "disable_any_whitespace": True},
    "regex": {"regex": PATTERN},
    "choice": {"choice": ["no", "no, it is not", "été"]},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def daemon(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    async with started(tmp_path_factory.mktemp("daemon"), ready=True, engine="native") as daemon:
        yield daemon


@pytest_asyncio.fixture(loop_scope="module")
async def session(daemon: Daemon) -> AsyncIterator[aiohttp.ClientSession]:
    url = (await daemon.ask("/status"))["api_url"]
    async with aiohttp.ClientSession(f"{url}/") as session:
        yield session


async def whole(session: aiohttp.ClientSession, **body: Any) -> Json:
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 300, **body}
    async with session.post("completions", json=asked) as response:
        answer: Json = await response.json()
        assert response.status == 200, answer
    return answer


async def streamed(session: aiohttp.ClientSession, **body: Any) -> tuple[str, str]:
    """Return the text of a stream of one choice, and why it ended."""
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 300, "stream": True, **body}
    text, finish = "", ""
    async with session.post("completions", json=asked) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                text, finish = text + choice["text"], choice["finish_reason"] or finish
    return text, finish


async def one(session: aiohttp.ClientSession, **body: Any) -> tuple[str, str, str | int | None]:
    (choice,) = (await whole(session, **body))["choices"]
    return choice["text"], choice["finish_reason"], choice["stop_reason"]


async def rebalance(daemon: Daemon, *numbers_of_stages: int) -> None:
    for number in numbers_of_stages:
        code, _, err = await daemon.flexctl("rebalance", "--stages", str(number), "--wait")
        assert code == 0, err


# --- words that must not come ---


def spelt(tokenizer: Tokenizer, words: list[str]) -> list[list[int]]:
    """Return words as tokens, at the beginning and behind a space where that is another first token: vLLM's rule."""
    found = []
    for word in words:
        bare, spaced = (tokenizer.encode(before + word.lstrip(), add_special_tokens=False).ids for before in ("", " "))
        found += [bare, spaced] if len(spaced) == len(bare) and spaced[0] != bare[0] else [bare]
    return found


def expected_text(words: list[str], *, max_tokens: int) -> str:
    """Return what transformers generates without these words, which must not be completed by what is generated."""
    tokenizer, model = Tokenizer.from_file(str(DEMO / "tokenizer.json")), AutoModelForCausalLM.from_pretrained(DEMO)
    ban = reference.NoBadWordsLogitsProcessor(spelt(tokenizer, words), eos_token_id=torch.tensor([EOS_ID]))
    inputs, cache, output = torch.tensor([tokenizer.encode(PROMPT).ids]), None, list[int]()
    with torch.inference_mode():
        while len(output) < max_tokens:
            made = model(inputs, past_key_values=cache, use_cache=True)
            logits = made.logits[:, -1]
            if output:
                logits = ban(torch.tensor([output]), logits.clone())
            output.append(int(logits.argmax()))
            inputs, cache = torch.tensor([output[-1:]]), made.past_key_values
    return str(tokenizer.decode(output))


async def test_bad_words_of_several_tokens_never_come_also_while_layers_move(
    daemon: Daemon, session: aiohttp.ClientSession
) -> None:
    asked = {"max_tokens": 300, "ignore_eos": True}
    plain, _, _ = await one(session, **asked)
    said = plain.split(" ")
    words = [" ".join(said[at : at + length]) for at, length in ((3, 2), (6, 3), (12, 2), (20, 4))]
    words = [*words, f" {words[0]}", words[1][:-1], "é🙂"]
    assert all(len(each) > 1 for each in spelt(Tokenizer.from_file(str(DEMO / "tokenizer.json")), words))
    expected = expected_text(words, max_tokens=300)
    assert expected != plain
    assert (await one(session, **asked, bad_words=words))[0] == expected
    running = asyncio.create_task(streamed(session, **asked, bad_words=words))
    while not running.done():
        await rebalance(daemon, 4, 1, 2)
    assert await running == (expected, "length")


async def test_echo_tells_as_many_of_the_likeliest_as_are_asked_for_in_each_place(
    session: aiohttp.ClientSession,
) -> None:
    asked = {"echo": True, "logprobs": 3, "max_tokens": 1}
    for top in (0, 2, 5):
        (choice,) = (await whole(session, **asked, prompt_logprobs=top))["choices"]
        told, apart = choice["logprobs"]["top_logprobs"][1:-1], choice["prompt_logprobs"][1:]
        assert {len(each) for each in told} <= {3, 4}  # the token itself is always among them
        assert {len(each) for each in apart} <= {max(top, 1), top + 1}


# --- how constrained output ends ---


def assert_complete(kind: str, text: str) -> None:
    match kind:
        case "json":
            jsonschema.validate(json.loads(text), SCHEMA)
        case "regex":
            assert re.fullmatch(PATTERN, text)
        case _:
            assert text in KINDS["choice"]["choice"]


async def all_kinds(session: aiohttp.ClientSession) -> list[tuple[str, str]]:
    jobs = [
        streamed(session, structured_outputs=source, temperature=temperature, seed=3)
        for source in KINDS.values()
        for temperature in (0, 1.2)
    ]
    return await asyncio.gather(*jobs)


@pytest.mark.parametrize("kind", KINDS)
async def test_what_cuts_constrained_output_leaves_its_beginning(session: aiohttp.ClientSession, kind: str) -> None:
    asked: Json = {"structured_outputs": KINDS[kind], "temperature": 1.2, "seed": 3}
    answer = await whole(session, **asked)
    text, count = answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert_complete(kind, text)
    for most in {1, count // 2, count - 1} - {0, count}:
        cut, finish, reason = await one(session, **asked, max_tokens=most)
        assert (text.startswith(cut.rstrip("\N{REPLACEMENT CHARACTER}")), finish, reason) == (True, "length", None)
    stop = text[len(text) // 2 :][:2]
    assert await one(session, **asked, stop=[stop]) == (text[: text.find(stop)], "stop", stop)


@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_else_is_asked_complete_output_is_complete(session: aiohttp.ClientSession, kind: str) -> None:
    asked: Json = {"structured_outputs": KINDS[kind]}
    for more in (
        {"min_tokens": 60},
        {"n": 3, "temperature": 1.2, "seed": 1},
        {"logit_bias": {str(EOS_ID): 100, **{str(token): -100 for token in range(3, 300, 2)}}},
        {"bad_words": ["{", '"', "-", "n", "no", "é", "0"]},  # the grammar needs some: there it wins
        {"presence_penalty": 2, "repetition_penalty": 9, "ignore_eos": True},
    ):
        for choice in (await whole(session, **asked, **more))["choices"]:
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
            assert_complete(kind, choice["text"])


async def test_constrained_output_is_the_same_while_layers_move_and_after_a_worker_died(
    daemon: Daemon, session: aiohttp.ClientSession
) -> None:
    undisturbed = await all_kinds(session)
    assert {finish for _, finish in undisturbed} == {"stop"}
    running = asyncio.create_task(all_kinds(session))
    await rebalance(daemon, 4, 2)
    assert await running == undisturbed
    running = asyncio.create_task(all_kinds(session))
    await asyncio.sleep(0.1)
    os.kill((await daemon.ask("/status"))["stages"][1]["workers"][0]["pid"], signal.SIGKILL)
    assert await running == undisturbed


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"json": {"type": "string", "minLength": 5, "maxLength": 2}}, "Unsatisfiable"),
        ({"json": {"enum": []}}, "Unsatisfiable"),
        ({"json": {"not": {}}}, "Unimplemented"),
        ({"json": {"$ref": "http://localhost/x.json"}}, "not present"),
        ({"json": {"$ref": "#"}}, "nothing could follow"),
        ({"grammar": 'start: start "a"'}, "nothing could follow"),
        ({"regex": "(?=a)b"}, "invalid regex"),
        ({"regex": r"a\b"}, "not supported"),
        ({"regex": "a" * 600_000}, "too long"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_a_grammar_that_cannot_be_met_is_refused_by_name(
    session: aiohttp.ClientSession, given: Json, why: str
) -> None:
    for stream in (False, True):
        body = {"prompt": PROMPT, "structured_outputs": given, "stream": stream}
        async with session.post("completions", json=body) as response:
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, "structured_outputs")
            assert why in error["message"]


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"regex": "^(yes|no)$"}, "yes|no"),
        ({"regex": "[é-ü€😀]{3}"}, "[é-ü€😀]{3}"),
        ({"json": {"type": "string", "pattern": "^[é-ü😀]{2}$"}}, '"[é-ü😀]{2}"'),
        ({"json": {"enum": [f"word {number}" for number in range(5000)]}}, '"word [0-9]{1,4}"'),
        ({"choice": [f"word {number}" for number in range(5000)]}, "word [0-9]{1,4}"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_anchors_characters_and_long_lists(session: aiohttp.ClientSession, given: Json, pattern: str) -> None:
    text, finish, _ = await one(session, structured_outputs=given)
    assert finish == "stop"
    assert re.fullmatch(pattern, text)
