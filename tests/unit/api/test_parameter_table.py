"""No documented parameter is dropped in silence: each is honoured, passed on, or refused by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from engines.fake import FAKE_CAPABILITIES, RICH_CAPABILITIES
from engines.protocol import EngineCapabilities
from engines.vllm.own_server import own_server
from flexpiped.api.errors import ApiError
from flexpiped.api.openapi import request_schema
from flexpiped.api.parameter_table import CHAT_PARAMETERS, COMPLETION_PARAMETERS, HonouredBy, Parameter
from flexpiped.api.parameters import parse_chat, parse_completion, taken_here
from flexpiped.api.routing import CHAT, COMPLETIONS, Intake, ToEngine, route
from tests.support.fake_own_server import with_server

VLLM = with_server(FAKE_CAPABILITIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """One path: its table, a request, and one value of each parameter that the daemon reads, with what shows it."""

    table: Mapping[str, Parameter]
    least: dict[str, Any]
    required: str
    parse: Callable[..., Any]
    intake: Intake[Any]
    documented: frozenset[str]  # as the openai client has it
    of_vllm: frozenset[str]


APIS = {
    "completions": Api(
        table=COMPLETION_PARAMETERS,
        least={"prompt": "Once"},
        required="prompt",
        parse=parse_completion,
        intake=COMPLETIONS,
        documented=frozenset(
            completion_params.CompletionCreateParamsBase.__annotations__
            | completion_params.CompletionCreateParamsStreaming.__annotations__
        ),
        of_vllm=own_server(()).completion_parameters,
    ),
    "chat": Api(
        table=CHAT_PARAMETERS,
        least={"messages": [{"role": "user", "content": "hello"}]},
        required="messages",
        parse=parse_chat,
        intake=CHAT,
        documented=frozenset(
            chat_params.CompletionCreateParamsBase.__annotations__
            | chat_params.CompletionCreateParamsStreaming.__annotations__
        ),
        of_vllm=own_server(()).chat_parameters,
    ),
}
TOOL = {"type": "function", "function": {"name": "paint"}}
# One value that is not the default of each, so that honouring it shows.
VALUES: dict[str, Any] = {
    "prompt": "other",
    "messages": [{"role": "user", "content": "other"}],
    "model": "tiny",
    "stream": True,
    "stream_options": {"include_usage": True},
    "user": "somebody",
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "seed": 5,
    "stop": ["x"],
    "stop_token_ids": [5],
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "allowed_token_ids": [5],
    "bad_words": ["x"],
    "frequency_penalty": 1,
    "logit_bias": {"5": 1},
    "min_p": 0.5,
    "min_tokens": 1,
    "presence_penalty": 1,
    "repetition_penalty": 2,
    "n": 3,
    "best_of": 4,
    "echo": True,
    "logprobs": True,  # of chats; a number of completions
    "top_logprobs": 2,
    "prompt_logprobs": 1,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a+"},
    "tools": [TOOL],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template_kwargs": {"enable_thinking": False},
}
WITHOUT_EFFECT = {"user"}  # names who asks, and is checked
NEEDED_WITH: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "continue_final_message": {"add_generation_prompt": False},
    "tool_choice": {"tools": [TOOL]},
    "parallel_tool_calls": {"tools": [TOOL]},
}
NOTHING_ALONE = {"parallel_tool_calls"}  # changes nothing where there are no tools
ALL_TAKEN = taken_here(RICH_CAPABILITIES, calls_tools=True)


@pytest.fixture(params=sorted(APIS))
def api(request: pytest.FixtureRequest) -> Api:
    return APIS[request.param]


def test_every_documented_parameter_is_in_the_table(api: Api) -> None:
    assert api.documented <= api.table.keys()
    assert api.of_vllm <= api.table.keys()
    assert api.table.keys() == api.intake.names


def test_what_the_daemon_honours_changes_the_request(api: Api) -> None:
    for name, parameter in api.table.items():
        if parameter.by is not HonouredBy.DAEMON:
            continue
        before = api.least | NEEDED_WITH.get(name, {})
        parsed = api.parse(before | {name: VALUES[name]})
        assert (parsed != api.parse(before)) is (name not in WITHOUT_EFFECT), name
        with pytest.raises(ApiError) as caught:
            api.parse(before | {name: 1j})  # nothing that JSON has
        assert caught.value.param == name


def test_what_engines_honour_is_passed_on_or_refused_by_name(api: Api) -> None:
    for name, parameter in api.table.items():
        if parameter.by is not HonouredBy.ENGINE:
            continue
        body = api.least | {name: VALUES[name]}
        assert name in api.parse(body, taken=ALL_TAKEN).parameters.engine_params
        refused_by_name(api, body, name, FAKE_CAPABILITIES)


def test_what_the_daemon_does_where_no_own_server_is_changes_the_request_or_is_refused_by_name(api: Api) -> None:
    for name, parameter in api.table.items():
        if parameter.by is not HonouredBy.OWN_SERVER_OR_DAEMON:
            continue
        needed = NEEDED_WITH.get(name, {})
        body = api.least | needed | {name: value_of(api, name)}
        before = api.parse(api.least | needed, taken=ALL_TAKEN)
        assert api.parse(body, taken=ALL_TAKEN) != before, name
        if name not in NOTHING_ALONE:
            with pytest.raises(ApiError) as caught:
                api.parse(api.least | {name: value_of(api, name)})
            assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
        if name in api.of_vllm and name not in NOTHING_ALONE:
            assert route(api.intake, api.least | {name: value_of(api, name)}, served="tiny", capabilities=VLLM) == (
                ToEngine(name)
            )
        for neutral in (None, *parameter.neutral):
            assert api.parse(api.least | {name: neutral}, taken=ALL_TAKEN) == api.parse(api.least)


def test_what_only_an_own_server_honours_goes_there_or_is_refused_by_name(api: Api) -> None:
    for name, parameter in api.table.items():
        if parameter.by is not HonouredBy.OWN_SERVER:
            continue
        body = api.least | {name: "a value of no other parameter"}
        refused_by_name(api, body, name, FAKE_CAPABILITIES)
        if name in api.of_vllm:
            assert route(api.intake, body, served="tiny", capabilities=VLLM) == ToEngine(name)
        else:
            refused_by_name(api, body, name, VLLM)
        for neutral in (None, *parameter.neutral):
            same = route(api.intake, api.least | {name: neutral}, served="tiny", capabilities=FAKE_CAPABILITIES)
            assert same == api.parse(api.least)


def refused_by_name(api: Api, body: dict[str, Any], name: str, capabilities: EngineCapabilities) -> None:
    with pytest.raises(ApiError) as caught:
        route(api.intake, body, served="tiny", capabilities=capabilities)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, name, "unsupported_parameter")
    assert name in caught.value.message


@pytest.mark.parametrize("capabilities", [FAKE_CAPABILITIES, RICH_CAPABILITIES], ids=["plain", "rich"])
def test_the_description_takes_what_the_parser_takes(api: Api, capabilities: EngineCapabilities) -> None:
    """Each parameter, with a value that is taken, neutral, or of another parameter."""
    schema = request_schema(api.table, required=api.required, model="tiny", capabilities=capabilities, calls_tools=True)
    described = jsonschema.Draft202012Validator(schema)
    for name, parameter in api.table.items():
        values = [None, *parameter.neutral, *VALUES.values(), 0, -1, 1.5, "", [], {}, True, False]
        for value in values:
            body = api.least | NEEDED_WITH.get(name, {}) | {name: value}
            assert described.is_valid(body) is is_taken(api, body, capabilities), (name, value)


def value_of(api: Api, name: str) -> Any:
    """Return one that is not the default."""
    return 2 if name == "logprobs" and api.required == "prompt" else VALUES[name]


def is_taken(api: Api, body: dict[str, Any], capabilities: EngineCapabilities) -> bool:
    try:
        parsed = api.parse(body, taken=taken_here(capabilities, calls_tools=True))
    except ApiError as refused:
        return refused.code == "contradiction"  # between parameters: no schema says so
    return parsed.parameters.model in (None, "tiny") and () not in getattr(parsed, "prompts", ())
