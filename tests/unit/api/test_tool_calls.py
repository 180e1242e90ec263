"""Tools through the application: what the official client gets of calls, whole and streamed, over several turns."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion

from engines.protocol import GenerationRequest, Grammar, GrammarKind
from engines.text.local import LocalText, PlainTokenizer
from flexpiped.api.tool_syntax import HERMES, MISTRAL, QWEN3_CODER, ToolCalls
from tests.support.http_app import MODEL, RICH, FakeEngines, http_app, ids_of, saying
from tests.support.schemathesis import cases_in, run_schemathesis
from tests.support.tiny_tokenizer import BOS, byte_level_tokenizer
from tests.unit.api.test_tools import CALLED, NOW, PAINT, RESULT, USER, named

pytestmark = pytest.mark.real_loop
ARGUMENTS = '{"colour": "red"}'
TWO = (
    f'I paint.\n<tool_call>\n{{"name": "paint", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
ONE = TWO[TWO.index("<tool_call>") : TWO.index('\n<tool_call>\n{"name": "now"')]


@asynccontextmanager
async def serving(
    text: str, calls: ToolCalls | None = ToolCalls(syntax=HERMES)
) -> AsyncIterator[tuple[list[Grammar | None], AsyncOpenAI]]:
    """Serve a model that always says ``text``; yield also what its output had to keep to, token by token."""
    grammars: list[Grammar | None] = []
    says = saying(text)

    def next_token(request: GenerationRequest, position: int) -> int:
        grammars.append(request.sampling.grammar)
        return says(request, position)

    engines = FakeEngines(next_token=next_token, capabilities=replace(RICH, grammars=True, max_model_len=1024))
    async with (
        http_app(engines=engines, tool_calls=calls) as app,
        AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield grammars, client
        await app.becomes_idle()


async def ask(client: AsyncOpenAI, **body: Any) -> Any:
    given = {"model": MODEL, "messages": [USER], "tools": [PAINT, NOW], "max_tokens": 150, **body}
    return await client.chat.completions.create(**given)


async def test_calls_beside_content() -> None:
    async with serving(TWO) as (_grammars, client):
        answer: ChatCompletion = await ask(client)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("I paint.", "tool_calls")
    calls = choice.message.tool_calls or []
    functions = [call.function for call in calls if call.type == "function"]
    assert [(each.name, each.arguments) for each in functions] == [("paint", ARGUMENTS), ("now", "{}")]
    assert len({call.id for call in calls}) == 2
    assert all(call.id.startswith("call_") for call in calls)


async def test_calls_as_they_come() -> None:
    async with serving(TWO) as (_grammars, client):
        chunks = [chunk async for chunk in await ask(client, stream=True)]
        given: Any = {"messages": [USER], "tools": [PAINT, NOW], "max_tokens": 150}
        async with client.chat.completions.stream(model=MODEL, **given) as stream:
            final = await stream.get_final_completion()
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "I paint."
    parts = [part for delta in deltas for part in delta.tool_calls or ()]
    assert len(parts) > 4, "arguments come in pieces"
    for index, (name, arguments) in enumerate((("paint", ARGUMENTS), ("now", "{}"))):
        first, *others = [part for part in parts if part.index == index]
        assert (first.type, first.function.name) == ("function", name)
        assert first.id.startswith("call_")
        assert all((part.id, part.type, part.function.name) == (None, None, None) for part in others)
        assert "".join(part.function.arguments for part in (first, *others)) == arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    message = final.choices[0].message
    assert [call.function.arguments for call in message.tool_calls or ()] == [ARGUMENTS, "{}"]


async def test_a_call_that_was_named_ends_as_openai_has_it() -> None:
    async with serving(ONE) as (_grammars, client):
        for choice, finish in ((named("paint"), "stop"), ("required", "tool_calls")):
            answer = await ask(client, tool_choice=choice)
            message = answer.choices[0].message
            assert (message.content, len(message.tool_calls)) == (None, 1)
            assert answer.choices[0].finish_reason == finish


async def test_no_call_is_text_and_none_means_none() -> None:
    async with serving("Just text.") as (_grammars, client):
        for choice in ("auto", "none"):
            answer = await ask(client, tool_choice=choice)
            assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Just text.", "stop")
            assert answer.choices[0].message.tool_calls is None
    async with serving(TWO) as (_grammars, client):
        answer = await ask(client, tool_choice="none")
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (TWO, "stop")


async def test_what_is_cut_off_says_so() -> None:
    async with serving(ONE) as (_grammars, client):
        answer = await ask(client, max_tokens=len(ids_of(ONE[: ONE.index("red")])))
    assert answer.choices[0].finish_reason == "length"
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.arguments == ARGUMENTS[: ARGUMENTS.index("red")]


async def test_several_choices_have_calls_of_their_own() -> None:
    async with serving(TWO) as (_grammars, client):
        answer = await ask(client, n=2, logprobs=True)
        chunks = [chunk async for chunk in await ask(client, n=2, stream=True, logprobs=True)]
    assert [len(choice.message.tool_calls) for choice in answer.choices] == [2, 2]
    assert len({call.id for choice in answer.choices for call in choice.message.tool_calls}) == 4
    told = len(answer.choices[0].logprobs.content)
    for index in (0, 1):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert sum(len(choice.logprobs.content) for choice in choices if choice.logprobs) == told
        assert {part.index for choice in choices for part in choice.delta.tool_calls or ()} == {0, 1}


async def test_an_opening_that_is_a_special_token_is_seen() -> None:
    """Whose text is not shown otherwise; and ids are such as Mistral's template takes."""
    text = f'{BOS}[{{"name": "paint", "arguments": {ARGUMENTS}}}]'
    calls = ToolCalls(syntax=replace(MISTRAL, opening=BOS), opening_id=0)
    async with serving(text, calls) as (_grammars, client):
        (call,) = (await ask(client)).choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments, len(call.id)) == ("paint", ARGUMENTS, 9)
        plain = await ask(client, tool_choice="none")
        assert plain.choices[0].message.content == text.removeprefix(BOS)


async def test_arguments_in_tags_become_json_of_the_types_that_their_tool_has() -> None:
    schema = {"type": "object", "properties": {"colour": {"type": "string"}, "layers": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "paint", "parameters": schema}}
    inside = "<parameter=colour>\n5\n</parameter>\n<parameter=layers>\n2\n</parameter>\n"
    text = f"<tool_call>\n<function=paint>\n{inside}</function>\n</tool_call>"
    async with serving(text, ToolCalls(syntax=QWEN3_CODER)) as (_grammars, client):
        answer = await ask(client, tools=[tool])
        chunks = [chunk async for chunk in await ask(client, tools=[tool], stream=True)]
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("paint", '{"colour": "5", "layers": 2}')
    parts = [part.function.arguments for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
    assert ("".join(parts), len(parts)) == (call.function.arguments, 4)


@pytest.mark.parametrize("more", [{"properties": [1]}, {"properties": {"colour": 5}, "required": 5}, {"$defs": []}])
async def test_what_is_no_schema_fails_no_request(more: dict[str, Any]) -> None:
    kinds = [{"type": 5}, {"type": [5]}, {"enum": 5}, {"anyOf": 5}, {"$ref": "#/$defs/x"}, {"$ref": "x"}]
    schema = {"properties": {f"p{index}": kind for index, kind in enumerate(kinds)}, **more}
    tool = {"type": "function", "function": {"name": "paint", "parameters": schema, "strict": True}}
    inside = "".join(f"<parameter=p{index}>5</parameter>" for index in range(len(kinds)))
    text = f"<tool_call><function=paint>{inside}</function></tool_call>"
    async with serving(text, ToolCalls(syntax=QWEN3_CODER)) as (_grammars, client):
        (call,) = (
            (await ask(client, tools=[tool], tool_choice="required", max_tokens=500)).choices[0].message.tool_calls
        )
    assert len(json.loads(call.function.arguments)) == len(kinds)


async def test_the_template_gets_tools_calls_and_results() -> None:
    text = LocalText(PlainTokenizer(byte_level_tokenizer()))
    called = {**CALLED, "content": "", "tool_calls": [{**CALLED["tool_calls"][0]}]}
    called["tool_calls"][0]["function"] = {"name": "paint", "arguments": json.loads(ARGUMENTS)}
    expected = await text.chat([USER, called, RESULT], tools=[PAINT])
    async with serving("Painted.") as (_grammars, client):
        answer = await ask(client, tools=[PAINT], messages=[USER, CALLED, RESULT])
        without = await ask(client, tools=[], messages=[USER, CALLED, RESULT])
    assert answer.choices[0].message.content == "Painted."
    assert answer.usage.prompt_tokens == len(expected)
    assert without.usage.prompt_tokens < len(expected)


async def test_the_tokens_of_a_conversation_with_tools() -> None:
    text = LocalText(PlainTokenizer(byte_level_tokenizer()))
    body = {"messages": [USER], "tools": [PAINT]}
    async with serving("") as (_grammars, client):
        answer: Any = await client.post("../tokenize", body=body, cast_to=object)
        assert answer["tokens"] == list(await text.chat([USER], tools=[PAINT]))
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("../tokenize", body={"prompt": "x", "tools": [PAINT]}, cast_to=object)
        assert (caught.value.param, caught.value.code) == ("tools", "contradiction")
    async with serving("", calls=None) as (_grammars, client):
        with pytest.raises(openai.BadRequestError, match="tools is not supported"):
            await client.post("../tokenize", body=body, cast_to=object)


async def test_the_engine_gets_a_grammar_where_something_is_to_be_kept_to() -> None:
    async with serving(ONE) as (grammars, client):
        for body, has_one in (
            ({}, True),
            ({"tools": [PAINT]}, False),
            ({"tools": [PAINT], "tool_choice": "required"}, True),
        ):
            await ask(client, **body)
            grammar = grammars[-1]
            assert (grammar is not None) is has_one
            assert grammar is None or (grammar.kind, grammar.parameter) == (GrammarKind.LARK, "tools")


async def test_a_model_that_calls_no_tools_says_so() -> None:
    async with serving("text", calls=None) as (_grammars, client):
        with pytest.raises(openai.BadRequestError, match="chat template shows no calls") as caught:
            await ask(client)
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")


@pytest.mark.long
async def test_schemathesis_finds_no_violation_where_tools_are_taken(tmp_path: Path) -> None:
    capabilities = replace(RICH, grammars=True, max_model_len=64)
    engines = FakeEngines(next_token=saying(ONE), capabilities=capabilities)
    async with http_app(engines=engines, tool_calls=ToolCalls(syntax=HERMES)) as app:
        paths = ("--include-path-regex", "/tokenize|/v1/chat.*")
        phases = ("--phases", "coverage,fuzzing", "--max-examples", "100")
        code, output = await run_schemathesis(app.url, *paths, *phases, folder=tmp_path)
    assert code == 0, output[-8000:]
    assert cases_in(output) > 1000, output[-2000:]
