"""Tools with the real engine: random weights call validly what they must call, and go on exactly while layers move."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import pytest_asyncio

from tests.support.chat_templates import QWEN
from tests.support.daemon import Daemon, started
from tests.support.native import CACHE
from tests.support.qwen_checkpoint import SMALL_SHAPE, make_qwen

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "grün"]},
        "strokes": {"type": "array", "items": {"type": "integer", "maximum": 999}, "minItems": 40, "maxItems": 50},
    },
    "required": ["colour", "strokes"],
    "additionalProperties": False,
}
PAINT: Any = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": SCHEMA}}
NOW: Any = {"type": "function", "function": {"name": "now"}}
SCHEMAS = {"paint": SCHEMA, "now": {"type": "object", "maxProperties": 0}}
QUESTION: Any = [{"role": "user", "content": "Paint, please."}]


def directory_in(folder: Path) -> Path:
    """Return the small Qwen with the template that published ones have."""
    source, directory = make_qwen(CACHE / f"qwen-{SMALL_SHAPE['hidden_size']}", shape=SMALL_SHAPE), folder / "qwen"
    directory.mkdir()
    for file in source.iterdir():
        if file.name != "tokenizer_config.json":
            (directory / file.name).symlink_to(file)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": QWEN}))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory_in(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def daemon(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    folder = tmp_path_factory.mktemp("daemon")
    async with started(folder, ready=True, engine="native", more=f'model = "{directory}"\n') as daemon:
        yield daemon


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(daemon: Daemon) -> AsyncIterator[openai.AsyncOpenAI]:
    url = (await daemon.ask("/status"))["api_url"]
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


async def ask(client: openai.AsyncOpenAI, **body: Any) -> Any:
    given = {"model": "qwen", "messages": QUESTION, "tools": [PAINT, NOW], "max_tokens": 3000, "temperature": 1.5}
    return await client.chat.completions.create(**{**given, **body})


def valid(calls: list[Any]) -> list[tuple[str, str]]:
    """Return names and arguments of calls, which keep to their schemas."""
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [(call.function.name, call.function.arguments) for call in calls]


async def test_required_calls_are_valid(client: openai.AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *(ask(client, tool_choice="required", parallel_tool_calls=False, seed=seed) for seed in range(4))
    )
    found = [valid(answer.choices[0].message.tool_calls) for answer in answers]
    assert {len(calls) for calls in found} == {1}
    assert {answer.choices[0].finish_reason for answer in answers} == {"tool_calls"}
    assert {answer.choices[0].message.content for answer in answers} == {None}
    assert len({calls[0] for calls in found}) > 1, "the weights choose"


async def test_what_is_named_is_called(client: openai.AsyncOpenAI) -> None:
    answer = await ask(client, tool_choice={"type": "function", "function": {"name": "paint"}}, seed=1)
    [(name, arguments)] = valid(answer.choices[0].message.tool_calls)
    assert (name, answer.choices[0].finish_reason) == ("paint", "stop")
    assert arguments.startswith('{"colour": "')


async def test_left_to_the_model_it_is_text(client: openai.AsyncOpenAI) -> None:
    """Random weights open no call by themselves."""
    for strict in (None, True):
        tool = {**NOW, "function": {**NOW["function"], "strict": strict}}
        answer = await ask(client, tools=[tool], max_tokens=40, seed=1)
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].message.content


@pytest.mark.long
async def test_a_streamed_call_goes_on_exactly_while_layers_move(daemon: Daemon, client: openai.AsyncOpenAI) -> None:
    body = {"tool_choice": {"type": "function", "function": {"name": "paint"}}, "seed": 5, "n": 2}
    undisturbed = [valid(choice.message.tool_calls) for choice in (await ask(client, **body)).choices]
    chunks = await ask(client, **body, stream=True)
    found = [""] * 2
    moving: asyncio.Task[tuple[int, str, str]] | None = None
    async for chunk in chunks:
        moving = moving or asyncio.create_task(daemon.flexctl("rebalance", "--stages", "4", "--wait"))
        for choice in chunk.choices:
            found[choice.index] += "".join(part.function.arguments for part in choice.delta.tool_calls or ())
    assert moving is not None
    assert moving.done(), "the layers have moved while the calls were written"
    code, _, err = await moving
    assert code == 0, err
    assert [[("paint", arguments)] for arguments in found] == undisturbed
    again = await ask(client, **body)
    assert [valid(choice.message.tool_calls) for choice in again.choices] == undisturbed


async def test_a_conversation_with_calls_is_rendered_as_transformers_does(
    client: openai.AsyncOpenAI, directory: Path
) -> None:
    from transformers import AutoTokenizer

    called = (await ask(client, tool_choice="required", parallel_tool_calls=False, seed=2)).choices[0].message
    [call] = called.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "painted"}
    sent = [*QUESTION, called.model_dump(exclude_none=True), result]
    answer = await ask(client, messages=sent, max_tokens=8)
    function = {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
    rendered = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}, result]
    loader: Any = AutoTokenizer
    tokenizer = loader.from_pretrained(directory)
    expected = tokenizer.apply_chat_template(
        rendered, tools=[PAINT, NOW], add_generation_prompt=True, return_dict=False
    )
    assert answer.usage.prompt_tokens == len(expected)
