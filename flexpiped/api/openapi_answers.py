"""Schemas of what the HTTP port answers. Pure data; an engine's own server may add further members."""

from collections.abc import Iterable
from typing import Any, Final

from flexpiped.api.errors import ErrorType

_COUNT: Final = {"type": "integer", "minimum": 0}
_TEXT: Final = {"type": "string"}
_TEXT_OR_NULL: Final = {"type": ["string", "null"]}


def _object(properties: dict[str, Any], *, optional: Iterable[str] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(properties.keys() - set(optional))}


_USAGE: Final = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
    },
    optional=("prompt_tokens_details",),  # where the engine tells it
)


def _answer(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    choice = {"index": _COUNT, "finish_reason": _TEXT, "logprobs": {"type": ["object", "null"]}, **choice}
    return _object(
        {
            "id": _TEXT,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _TEXT,
            "choices": {"type": "array", "minItems": 1, "items": _object(choice)},
            "usage": _USAGE,
        }
    )


_CALL: Final = _object(
    {
        "id": _TEXT,
        "type": {"const": "function"},
        "function": _object({"name": _TEXT, "arguments": _TEXT}),
    }
)
_MODEL: Final = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "max_model_len": {"type": ["integer", "null"], "minimum": 1},
        "parent": _TEXT,
    },
    optional=("parent",),  # of an adapter
)
SCHEMAS: Final[dict[str, Any]] = {
    "Completion": _answer("text_completion", {"text": _TEXT}),
    "ChatCompletion": _answer(
        "chat.completion",
        {
            "message": _object(
                {"role": _TEXT, "content": _TEXT_OR_NULL, "tool_calls": {"type": "array", "items": _CALL}},
                optional=("tool_calls",),  # where there are some
            )
        },
    ),
    "Tokens": _object(
        {"count": _COUNT, "max_model_len": _COUNT, "tokens": {"type": "array", "items": _COUNT}, "token_strs": {}}
    ),
    "Text": _object({"prompt": _TEXT}),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}}),
    "Version": _object({"version": _TEXT, "engine": _TEXT_OR_NULL}),
    "Document": {"type": "object"},
    "Liveness": _object({"status": {"const": "alive"}}),
    "Readiness": _object({"status": _TEXT, "reason": _TEXT}),
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _TEXT,
                    "type": {"type": "string", "examples": [each.value for each in ErrorType]},
                    "param": _TEXT_OR_NULL,
                    "code": {"type": ["string", "integer", "null"]},
                }
            )
        }
    ),
}
EVENT: Final = {  # one server-sent event; the last one of a stream is "[DONE]"
    "type": "object",
    "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
    "required": ["data"],
}
_STATUSES: Final = {
    "400": "what is asked for is wrong or not supported; the parameter is named",
    "401": "no API key, or one that is not known",
    "403": "the API key opens other things",
    "404": "no such model, or the engine has no such route",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "429": "too much is in flight, or the key's limit is reached; Retry-After says when",
    "500": "the engine failed",
    "503": "not now; Retry-After says when",
}


def _errors(*statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    retry = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "in seconds"}}
    return {
        status: {"description": _STATUSES[status], "content": content}
        | ({"headers": retry} if status in ("429", "503") else {})
        for status in statuses
    }


ERRORS: Final = _errors(*_STATUSES)
READ_ERRORS: Final = _errors("401", "403", "404", "503")
