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
_TOKEN_IDS: Final = {"type": "array", "items": TOKEN_ID, "minItems": 1}
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
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""  # it has called tools, or had nothing to say
    return {"role": _ROLES[role], "content": _content(f"{name}.content", content)}


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
