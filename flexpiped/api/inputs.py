"""What a request is about: its prompt or its messages."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from flexpiped.api.errors import invalid
from flexpiped.api.fields import TOKEN_ID, Reader, name_of, token_ids, wrong_type
from flexpiped.api.tool_messages import CALLS_SCHEMA, read_calls, read_text

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}  # as given: as rendered
_TEXT_PART: Final = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]}
_MESSAGE: Final = {
    "type": "object",
    "properties": {
        "role": {"enum": list(_ROLES)},
        "content": {},
    },
    "required": ["role"],
    "if": {"properties": {"role": {"const": "assistant"}}},
    "then": {"properties": {"content": {"anyOf": [{"type": "null"}, _CONTENT]}}},
    "else": {"properties": {"content": _CONTENT}, "required": ["content"]},
    "additionalProperties": {"enum": [None, [], {}]},  # of what is not supported, only what says nothing
}
_OF_TOOLS: Final = ("tool_calls", "tool_call_id", "name")
_NOTHING: Final[Mapping[str, Any]] = {"enum": [None, [], {}]}
_WITH_TOOLS: Final = {
    **_MESSAGE,
    "properties": {
        "role": {"enum": [*_ROLES, "tool"]},
        "content": {},
        **{name: {} for name in _OF_TOOLS},
    },
    "allOf": [
        {
            "if": {"properties": {"role": {"const": "assistant"}}},
            "then": {"properties": {"tool_calls": CALLS_SCHEMA}},
            "else": {"properties": {"tool_calls": _NOTHING}},
        },
        {
            "if": {"properties": {"role": {"const": "tool"}}},
            "then": {
                "properties": {"tool_call_id": {"type": "string"}, "name": {"type": ["string", "null"]}},
                "required": ["tool_call_id"],
            },
            "else": {"properties": {"tool_call_id": _NOTHING, "name": _NOTHING}},
        },
    ],
}
_TOKEN_IDS: Final = {"type": "array", "items": TOKEN_ID, "minItems": 1}
_KEYS_OF_TOOLS: Final = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
MAX_PROMPTS: Final = 1024
Prompt = str | tuple[int, ...]


def read_prompts(value: Any) -> tuple[Prompt, ...]:
    """Read a string, token ids, or an array of either. Raises: ApiError."""
    if not isinstance(value, list) or not value or not isinstance(value[0], str | list):
        return (_prompt(value),)
    if len(value) > MAX_PROMPTS:
        message = f"prompt: at most {MAX_PROMPTS} prompts a request, not {len(value)}"
        raise invalid(message, param="prompt", code="invalid_value")
    if not all(isinstance(each, type(value[0])) for each in value):
        raise invalid("prompt must not mix strings and token ids", param="prompt", code="invalid_type")
    return tuple(map(_prompt, value))


def _prompt(value: Any) -> Prompt:
    match value:
        case None:
            raise invalid("prompt is required", param="prompt", code="missing_parameter")
        case str():
            return value
        case list():
            return token_ids.parse("prompt", value)
        case _:
            raise wrong_type("prompt", "a string or an array of token ids", value)


def read_messages(value: Any, *, with_tools: bool = False) -> tuple[dict[str, Any], ...]:
    """Read messages of role and text, and ``with_tools`` also calls of tools and their results. Raises: ApiError."""
    if value is None:
        raise invalid("messages is required", param="messages", code="missing_parameter")
    if not isinstance(value, list):
        raise wrong_type("messages", "an array", value)
    if not value:
        raise invalid("messages must hold at least one message", param="messages", code="invalid_value")
    roles = {**_ROLES, "tool": "tool"} if with_tools else _ROLES
    return tuple(_message(f"messages[{index}]", message, roles) for index, message in enumerate(value))


def _message(name: str, message: Any, roles: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise wrong_type(name, "an object", message)
    role = message.get("role")
    keys = _KEYS_OF_TOOLS.get(role, ()) if isinstance(role, str) and "tool" in roles else ()
    for key, value in message.items():
        if key not in ("role", "content", *keys) and value not in (None, [], {}):
            raise invalid(f"{name}.{key} is not supported", param=f"{name}.{key}", code="unsupported_parameter")
    if not isinstance(role, str) or role not in roles:
        wanted, code = ", ".join(roles), "unsupported_value" if isinstance(role, str) else "invalid_value"
        raise invalid(f"{name}.role must be one of {wanted}", param=f"{name}.role", code=code)
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""  # it has called tools, or had nothing to say
    read = {"role": roles[role], "content": _content(f"{name}.content", content)}
    return read | _of_tools(name, message, keys)


def _of_tools(name: str, message: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return what a message says of tools; what says nothing is left out, as templates look whether it is there."""
    if "tool_call_id" in keys:
        result = {"tool_call_id": read_text(f"{name}.tool_call_id", message.get("tool_call_id"))}
        called = message.get("name")
        return result if called is None else result | {"name": read_text(f"{name}.name", called)}
    if "tool_calls" in keys and message.get("tool_calls") not in (None, [], {}):
        return {"tool_calls": read_calls(f"{name}.tool_calls", message["tool_calls"])}
    return {}


def _content(name: str, value: Any) -> str:
    """Return the text of a message: a string, or parts that are all text, each on lines of its own as in vLLM."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of parts", value)
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else name_of(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            where = f"{name}[{index}]"
            raise invalid(f"{where}: only parts of type text are supported", param=where, code="unsupported_value")
        texts.append(part["text"])
    return "\n".join(texts)


PROMPT: Final = Reader(
    parse=lambda _name, value: read_prompts(value),
    schema={
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
            _TOKEN_IDS,
            {"type": "array", "items": _TOKEN_IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
        ]
    },
)
MESSAGES: Final = Reader(
    parse=lambda _name, value: read_messages(value),
    schema={"type": "array", "items": _MESSAGE, "minItems": 1},
)
# Where the model is known to call tools.
MESSAGES_WITH_TOOLS: Final = Reader(
    parse=lambda _name, value: read_messages(value, with_tools=True),
    schema={"type": "array", "items": _WITH_TOOLS, "minItems": 1},
)
