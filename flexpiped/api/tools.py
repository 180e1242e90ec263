"""Tools that a chat offers to the model: ``tools``, ``tool_choice`` and ``parallel_tool_calls``, read and checked.

Whether the schema of a tool's arguments is one, the engine says, which compiles it.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import msgspec

from engines.protocol import Grammar, GrammarKind
from flexpiped.api.errors import invalid
from flexpiped.api.fields import Body, Reader, boolean, refuse_unknown, wrong_type
from flexpiped.api.unsupported import CHAT_NEUTRAL, has_no_effect

TOOLS: Final = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
MAX_TOOLS: Final = 128  # as OpenAI's
_NAME: Final = "[a-zA-Z0-9_.:/-]{1,64}"  # OpenAI's, and what divides names of MCP servers
_NO_ARGUMENTS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}


class ToolChoice(Enum):
    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"  # of one that is named, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One function. ``schema``: of its arguments, as JSON. ``is_strict``: all of the schema must be kept to."""

    name: str
    schema: str
    is_strict: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """``given`` is what the chat template gets. ``only``: the tool that must be called, empty: it is not said."""

    given: tuple[dict[str, Any], ...]
    functions: tuple[Tool, ...]
    choice: ToolChoice = ToolChoice.AUTO
    only: str = ""
    are_parallel: bool = True


def read_tools(body: Body, *, taken: Set[str], grammar: Grammar | None) -> Tools | None:
    """Return what a chat says of tools, None where it has none.

    Args:
        grammar: What the content must keep to.

    Raises:
        ApiError: The parameter is named.
    """
    if not taken >= TOOLS:
        return None
    found = READERS["tools"](body, "tools") or ((), ())
    chosen = READERS["tool_choice"](body, "tool_choice") or (ToolChoice.AUTO, "")
    parallel = READERS["parallel_tool_calls"](body, "parallel_tool_calls")
    if not found[0]:
        if not has_no_effect(body.get("tool_choice"), CHAT_NEUTRAL["tool_choice"]):
            raise _contradiction("tool_choice", "tool_choice needs tools")
        return None
    if chosen[1] and chosen[1] not in {each.name for each in found[1]}:
        raise _contradiction("tool_choice", f"tool_choice: there is no tool {chosen[1]!r} among tools")
    if grammar is not None and grammar.kind is not GrammarKind.JSON_SCHEMA and chosen[0] is not ToolChoice.NONE:
        raise _contradiction(grammar.parameter, f"{grammar.parameter} goes together with tools as a JSON schema only")
    return Tools(
        given=found[0], functions=found[1], choice=chosen[0], only=chosen[1], are_parallel=parallel is not False
    )


def _tools(name: str, value: Any) -> tuple[tuple[dict[str, Any], ...], tuple[Tool, ...]]:
    if not isinstance(value, list):
        raise wrong_type(name, "an array", value)
    if len(value) > MAX_TOOLS:
        message = f"{name}: at most {MAX_TOOLS} tools a request, not {len(value)}"
        raise invalid(message, param=name, code="invalid_value")
    tools = tuple(_tool(f"{name}[{index}]", each) for index, each in enumerate(value))
    names = [each.name for each in tools]
    twice = next((each for each in names if names.count(each) > 1), None)
    if twice is not None:
        raise _contradiction(name, f"{name}: {twice!r} is there twice")
    return tuple(value), tools


def _tool(name: str, value: Any) -> Tool:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    if value.get("type") != "function":
        message = f"{name}.type must be function: no other tools are supported"
        raise invalid(message, param=f"{name}.type", code="unsupported_value")
    refuse_unknown({f"{name}.{key}": 0 for key in value}, {f"{name}.type", f"{name}.function"})
    where, function = f"{name}.function", value.get("function")
    if not isinstance(function, dict):
        raise wrong_type(where, "an object", function)
    refuse_unknown(
        {f"{where}.{key}": 0 for key in function},
        {f"{where}.{key}" for key in ("name", "description", "parameters", "strict")},
    )
    description = function.get("description")
    if not isinstance(description, str | None):
        raise wrong_type(f"{where}.description", "a string", description)
    return Tool(
        name=_function_name(f"{where}.name", function.get("name")),
        schema=_schema(f"{where}.parameters", function.get("parameters")),
        is_strict=boolean({f"{where}.strict": function.get("strict")}, f"{where}.strict") or False,
    )


def _function_name(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    if not re.fullmatch(_NAME, value):
        message = f"{name} must be 1 to 64 letters, digits and any of _ . : / -"
        raise invalid(message, param=name, code="invalid_value")
    return value


def _schema(name: str, value: Any) -> str:
    if value is None:
        return msgspec.json.encode(_NO_ARGUMENTS).decode()
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    if value.get("type", "object") != "object":
        raise invalid(f"{name}.type must be object", param=f"{name}.type", code="invalid_value")
    return msgspec.json.encode({**value, "type": "object"}).decode()


def _choice(name: str, value: Any) -> tuple[ToolChoice, str]:
    if isinstance(value, str):
        words = [each.value for each in ToolChoice]
        if value not in words:
            message = f"{name} must be one of {', '.join(words)}, or name a function"
            raise invalid(message, param=name, code="unsupported_value")
        return ToolChoice(value), ""
    if not isinstance(value, dict):
        raise wrong_type(name, "a string or an object", value)
    if value.get("type") != "function":
        raise invalid(f"{name}.type must be function", param=f"{name}.type", code="unsupported_value")
    refuse_unknown({f"{name}.{key}": 0 for key in value}, {f"{name}.type", f"{name}.function"})
    where, function = f"{name}.function", value.get("function")
    if not isinstance(function, dict):
        raise wrong_type(where, "an object", function)
    refuse_unknown({f"{where}.{key}": 0 for key in function}, {f"{where}.name"})
    return ToolChoice.REQUIRED, _function_name(f"{where}.name", function.get("name"))


def _contradiction(name: str, message: str) -> Exception:
    return invalid(message, param=name, code="contradiction")


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


_NAMED: Final = {"type": "string", "pattern": f"^{_NAME}$"}
_FUNCTION: Final = _object(
    {
        "name": _NAMED,
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"], "properties": {"type": {"const": "object"}}},
        "strict": {"type": ["boolean", "null"]},
    },
    "name",
)
READERS: Final[Mapping[str, Reader[Any]]] = {
    "tools": Reader(
        parse=_tools,
        schema={
            "type": "array",
            "maxItems": MAX_TOOLS,
            "items": _object({"type": {"const": "function"}, "function": _FUNCTION}, "type", "function"),
        },
    ),
    "tool_choice": Reader(
        parse=_choice,
        schema={
            "anyOf": [
                {"enum": [each.value for each in ToolChoice]},
                _object(
                    {"type": {"const": "function"}, "function": _object({"name": _NAMED}, "name")}, "type", "function"
                ),
            ]
        },
    ),
    "parallel_tool_calls": boolean,
}
