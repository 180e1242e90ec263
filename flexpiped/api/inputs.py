"""What a request is about: its prompt or its messages."""

from typing import Any, Final

from flexpiped.api.errors import invalid
from flexpiped.api.fields import TOKEN_ID, Reader, name_of, token_ids, wrong_type

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}  # as given: as rendered
_TEXT_PART: Final = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MESSAGE: Final = {
    "type": "object",
    "properties": {
        "role": {"enum": list(_ROLES)},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]},
    },
    "required": ["role", "content"],
    "additionalProperties": {"enum": [None, [], {}]},  # of what is not supported, only what says nothing
}
_TOKEN_IDS: Final = {"type": "array", "items": TOKEN_ID, "minItems": 1}


def read_prompt(value: Any) -> str | tuple[int, ...]:
    """Read a string, token ids, or an array of exactly one of either. Raises: ApiError."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            message = f"prompt: one prompt a request, not {len(value)}"
            raise invalid(message, param="prompt", code="unsupported_value")
        value = value[0]
    match value:
        case None:
            raise invalid("prompt is required", param="prompt", code="missing_parameter")
        case str():
            return value
        case list():
            return token_ids.parse("prompt", value)
        case _:
            raise wrong_type("prompt", "a string or an array of token ids", value)


def read_messages(value: Any) -> tuple[dict[str, str], ...]:
    """Read messages of role and text. Raises: ApiError."""
    if value is None:
        raise invalid("messages is required", param="messages", code="missing_parameter")
    if not isinstance(value, list):
        raise wrong_type("messages", "an array", value)
    if not value:
        raise invalid("messages must hold at least one message", param="messages", code="invalid_value")
    return tuple(_message(f"messages[{index}]", message) for index, message in enumerate(value))


def _message(name: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise wrong_type(name, "an object", message)
    for key, value in message.items():
        if key not in ("role", "content") and value not in (None, [], {}):
            raise invalid(f"{name}.{key} is not supported", param=f"{name}.{key}", code="unsupported_parameter")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        wanted, code = ", ".join(_ROLES), "unsupported_value" if isinstance(role, str) else "invalid_value"
        raise invalid(f"{name}.role must be one of {wanted}", param=f"{name}.role", code=code)
    return {"role": _ROLES[role], "content": _content(f"{name}.content", message.get("content"))}


def _content(name: str, value: Any) -> str:
    """Return the text of a message: a string, or parts that are all text."""
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
    return "".join(texts)


PROMPT: Final = Reader(
    parse=lambda _name, value: read_prompt(value),
    schema={
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1},
            _TOKEN_IDS,
            {"type": "array", "items": _TOKEN_IDS, "minItems": 1, "maxItems": 1},
        ]
    },
)
MESSAGES: Final = Reader(
    parse=lambda _name, value: read_messages(value),
    schema={"type": "array", "items": _MESSAGE, "minItems": 1},
)
