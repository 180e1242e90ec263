"""Tools are read as OpenAI documents them, or refused by name; their syntax is told from published templates."""

import json
from typing import Any

import jsonschema
import pytest

from engines.fake import RICH_CAPABILITIES
from flexpiped.api.errors import ApiError
from flexpiped.api.openapi import request_schema
from flexpiped.api.parameter_table import CHAT_PARAMETERS
from flexpiped.api.parameters import ChatRequest, parse_chat, taken_here
from flexpiped.api.tool_syntax import (
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_ARGS,
    QWEN3_CODER,
    SYNTAXES,
    ToolCalls,
    ToolSyntax,
    tool_calls_of,
)
from flexpiped.api.tools import ToolChoice
from flexpiped.settings import ToolFormat
from tests.support.chat_templates import LLAMA3, MISTRAL_V3, QWEN

SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
PAINT: dict[str, Any] = {
    "type": "function",
    "function": {"name": "paint", "description": "Paints.", "parameters": SCHEMA},
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now", "strict": True}}
USER: dict[str, Any] = {"role": "user", "content": "hello"}
CALL: dict[str, Any] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "paint", "arguments": '{"colour": "red"}'},
}
CALLED: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "call_1", "content": "done"}
TAKEN = taken_here(RICH_CAPABILITIES, calls_tools=True)
DESCRIBED = jsonschema.Draft202012Validator(
    request_schema(CHAT_PARAMETERS, required="messages", model="tiny", capabilities=RICH_CAPABILITIES, calls_tools=True)
)


def chat(**body: Any) -> ChatRequest:
    assert DESCRIBED.is_valid({"messages": [USER], **body})
    return parse_chat({"messages": [USER], **body}, taken=TAKEN)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_tools_as_they_are_given_and_what_their_arguments_must_be() -> None:
    tools = chat(tools=[PAINT, NOW]).tools
    assert tools is not None
    assert tools.given == (PAINT, NOW)
    assert [(each.name, each.is_strict) for each in tools.functions] == [("paint", False), ("now", True)]
    assert json.loads(tools.functions[0].schema) == SCHEMA
    assert json.loads(tools.functions[1].schema) == {"type": "object", "properties": {}, "additionalProperties": False}
    assert (tools.choice, tools.only, tools.are_parallel) == (ToolChoice.AUTO, "", True)


@pytest.mark.parametrize(
    ("body", "choice", "only", "are_parallel"),
    [
        ({"tool_choice": "none"}, ToolChoice.NONE, "", True),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ToolChoice.REQUIRED, "", False),
        ({"tool_choice": named("now"), "parallel_tool_calls": True}, ToolChoice.REQUIRED, "now", True),
        ({"tool_choice": "auto", "response_format": {"type": "json_object"}}, ToolChoice.AUTO, "", True),
        ({"tool_choice": "none", "structured_outputs": {"regex": "a"}}, ToolChoice.NONE, "", True),
    ],
)
def test_choices(body: dict[str, Any], choice: ToolChoice, only: str, are_parallel: bool) -> None:
    tools = chat(tools=[PAINT, NOW], **body).tools
    assert tools is not None
    assert (tools.choice, tools.only, tools.are_parallel) == (choice, only, are_parallel)


@pytest.mark.parametrize("body", [{}, {"tools": []}, {"tools": None, "tool_choice": "none"}, {"tool_choice": "auto"}])
def test_without_tools_there_are_none(body: dict[str, Any]) -> None:
    assert chat(**body).tools is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": PAINT}, "tools"),
        ({"tools": [PAINT] * 129}, "tools"),
        ({"tools": ["paint"]}, "tools[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [PAINT | {"more": 1}]}, "tools[0].more"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "defer": 1}}]}, "tools[0].function.defer"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": 1}}]}, "tools[0].function.strict"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "description": 1}}]},
            "tools[0].function.description",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]}, "tools[0].function.parameters"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters.type",
        ),
        ({"tools": [PAINT], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [PAINT], "tool_choice": 5}, "tool_choice"),
        ({"tools": [PAINT], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": [PAINT], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [PAINT], "tool_choice": {"type": "function", "function": {"name": 5}}}, "tool_choice.function.name"),
        ({"tools": [PAINT], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [CALLED | {"tool_calls": CALL}]}, "messages[0].tool_calls"),
        ({"messages": [CALLED | {"tool_calls": ["x"]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [CALLED | {"tool_calls": [CALL | {"type": "custom"}]}]}, "messages[0].tool_calls[0].type"),
        ({"messages": [CALLED | {"tool_calls": [CALL | {"id": None}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [CALLED | {"tool_calls": [CALL | {"function": 1}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [CALLED | {"tool_calls": [CALL | {"more": 1}]}]}, "messages[0].tool_calls[0].more"),
        ({"messages": [CALLED | {"tool_calls": [CALL | {"index": "0"}]}]}, "messages[0].tool_calls[0].index"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [RESULT | {"content": None}]}, "messages[0].content"),
        ({"messages": [RESULT | {"name": 5}]}, "messages[0].name"),
        ({"messages": [{"role": "function", "name": "x", "content": "x"}]}, "messages[0].name"),
    ],
)
def test_what_is_wrong_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat({"messages": [USER], **body}, taken=TAKEN)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert not DESCRIBED.is_valid({"messages": [USER], **body})


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"tools": [PAINT, PAINT]}, "tools", "contradiction"),
        ({"tool_choice": "required"}, "tool_choice", "contradiction"),
        ({"tools": [PAINT], "tool_choice": named("sing")}, "tool_choice", "contradiction"),
        ({"tools": [PAINT], "structured_outputs": {"regex": "a"}}, "structured_outputs", "contradiction"),
        (
            {"messages": [CALLED | {"tool_calls": [CALL | {"function": {"name": "x", "arguments": "[]"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "invalid_arguments",
        ),
    ],
)
def test_what_no_schema_says_is_refused_by_name(body: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**body)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


def test_calls_and_results_go_to_the_template_with_arguments_as_objects() -> None:
    assert chat(messages=[CALLED | {"tool_calls": [CALL | {"index": 0}]}]).messages == chat(messages=[CALLED]).messages
    messages = chat(
        messages=[USER, CALLED, RESULT | {"name": "paint"}, {"role": "assistant", "tool_calls": []}]
    ).messages
    function = {"name": "paint", "arguments": {"colour": "red"}}
    assert messages == (
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL | {"function": function}]},
        {**RESULT, "name": "paint"},
        {"role": "assistant", "content": ""},
    )


def test_of_a_model_that_calls_no_tools_they_are_refused_with_the_reason() -> None:
    taken = taken_here(RICH_CAPABILITIES)
    for body, param in (({"tools": [PAINT]}, "tools"), ({"messages": [USER, CALLED]}, "messages[1].tool_calls")):
        with pytest.raises(ApiError) as caught:
            parse_chat({"messages": [USER], **body}, taken=taken)
        assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")
    with pytest.raises(ApiError, match="chat template shows no calls of a form that is known here"):
        parse_chat({"messages": [USER], "tools": [PAINT]}, taken=taken)


@pytest.mark.parametrize(
    ("template", "syntax"),
    [
        (QWEN, HERMES),
        (LLAMA3, LLAMA3_JSON),
        (MISTRAL_V3, MISTRAL),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", None),
        (QWEN.replace("<tool_call>\\n{", "<tool_call>\\n<function=f>\\n<parameter=k>"), QWEN3_CODER),
        (QWEN.replace("<tool_call>\\n{", "<tool_call>\\n<function={"), None),  # of others
        (MISTRAL_V3.replace('"[TOOL_CALLS] ["', '"[TOOL_CALLS]" + name + "[ARGS]"'), MISTRAL_ARGS),  # later ones
        (MISTRAL_V3.replace('"[TOOL_CALLS] ["', '"[TOOL_CALLS]" + name + "[CALL_ID]x[ARGS]"'), None),  # between them
        ("{% if tools %}<｜tool▁calls▁begin｜>{% endif %}", None),
    ],
)
def test_the_syntax_is_what_the_template_shows(template: str, syntax: ToolSyntax | None) -> None:
    added = {"[TOOL_CALLS]": 5, "[ARGS]": 6, "<|python_tag|>": 128010, "</tool_call>": 7}
    found = tool_calls_of("auto", chat_template=template, added_tokens=added)
    assert found == (
        None
        if syntax is None
        else ToolCalls(
            syntax=syntax,
            opening_id=added.get(syntax.opening),
            closing_id=7 * (syntax in (HERMES, QWEN3_CODER)) or None,
            separator_id=6 * (syntax is MISTRAL_ARGS) or None,
        )
    )


def test_the_syntax_is_what_is_configured() -> None:
    assert {each.value for each in ToolFormat} == {"auto", "off", *SYNTAXES}
    for name, syntax in SYNTAXES.items():
        assert tool_calls_of(name, chat_template="x", added_tokens={}) == ToolCalls(syntax=syntax)
        assert tool_calls_of(name, chat_template=None, added_tokens={}) is None
    assert tool_calls_of("off", chat_template=QWEN, added_tokens={}) is None
