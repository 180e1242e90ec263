"""What messages of a chat say of tools: calls that the model made, and their results, as chat templates take them."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from flexpiped.api.errors import invalid
from flexpiped.api.fields import integer, refuse_unknown, wrong_type

_INDEX: Final = integer(0, 2**31 - 1)
_CALL: Final = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        },
        "index": {"anyOf": [_INDEX.schema, {"type": "null"}]},
    },
    "required": ["id", "type", "function"],
    "additionalProperties": False,
}
CALLS_SCHEMA: Final[Mapping[str, Any]] = {"anyOf": [{"enum": [None, {}]}, {"type": "array", "items": _CALL}]}


def read_calls(name: str, value: Any) -> list[dict[str, Any]]:
    """Return the calls of a message, with arguments as objects: chat templates write them as JSON themselves.

    Raises:
        ApiError
    """
    if not isinstance(value, list):
        raise wrong_type(name, "an array", value)
    return [_call(f"{name}[{index}]", each) for index, each in enumerate(value)]


def _call(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    # "index" is of streams, whose parts some clients send back
    refuse_unknown(
        {f"{name}.{key}": 0 for key in value}, {f"{name}.{key}" for key in ("id", "type", "function", "index")}
    )
    _INDEX({f"{name}.index": value.get("index")}, f"{name}.index")
    if value.get("type") != "function":
        message = f"{name}.type must be function: no other calls are supported"
        raise invalid(message, param=f"{name}.type", code="unsupported_value")
    where, function = f"{name}.function", value.get("function")
    if not isinstance(function, dict):
        raise wrong_type(where, "an object", function)
    refuse_unknown({f"{where}.{key}": 0 for key in function}, {f"{where}.name", f"{where}.arguments"})
    called = {
        "name": read_text(f"{where}.name", function.get("name")),
        "arguments": _arguments(f"{where}.arguments", function.get("arguments")),
    }
    return {"id": read_text(f"{name}.id", value.get("id")), "type": "function", "function": called}


def _arguments(name: str, value: Any) -> dict[str, Any]:
    text = read_text(name, value)
    try:
        found = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise invalid(f"{name} must be an object as JSON in a string", param=name, code="invalid_arguments")
    return found


def read_text(name: str, value: Any) -> str:
    """Raises: ApiError."""
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    return value
