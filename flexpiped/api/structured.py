"""What an output must keep to: OpenAI's ``response_format`` and vLLM's ``structured_outputs``, read and checked.

Whether a schema or an expression is one, the engine says, which compiles it.
"""

from collections.abc import Mapping, Set
from typing import Any, Final

import msgspec

from engines.protocol import Grammar, GrammarKind
from flexpiped.api.errors import invalid
from flexpiped.api.fields import Body, Reader, boolean, ensure_strings, refuse_unknown, wrong_type
from flexpiped.api.unsupported import COMPLETION_NEUTRAL, has_no_effect

STRUCTURED: Final = frozenset({"response_format", "structured_outputs"})
_ANY_OBJECT: Final = '{"type":"object"}'
_FORMATS: Final = ("text", "json_object", "json_schema")
_OPTION: Final = "disable_any_whitespace"


def _response_format(name: str, value: Any) -> Grammar | None:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    kind = value.get("type")
    if kind not in _FORMATS:
        message = f"{name}.type must be one of {', '.join(_FORMATS)}"
        raise invalid(message, param=f"{name}.type", code="unsupported_value")
    known = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    refuse_unknown({f"{name}.{key}": each for key, each in value.items()}, {f"{name}.{key}" for key in known})
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar(kind=GrammarKind.JSON_SCHEMA, source=_ANY_OBJECT, parameter=name)
    return Grammar(kind=GrammarKind.JSON_SCHEMA, source=_json_schema(name, value.get("json_schema")), parameter=name)


def _json_schema(name: str, value: Any) -> str:
    where = f"{name}.json_schema"
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    if not isinstance(value.get("name"), str):
        raise wrong_type(f"{where}.name", "a string", value.get("name"))
    schema = value.get("schema")
    if not isinstance(schema, dict):
        raise wrong_type(f"{where}.schema", "an object", schema)
    boolean({f"{where}.strict": value.get("strict")}, f"{where}.strict")
    refuse_unknown(
        {f"{where}.{key}": each for key, each in value.items()},
        {f"{where}.{key}" for key in ("name", "description", "schema", "strict")},
    )
    return _encoded(schema)


def _structured_outputs(name: str, value: Any) -> Grammar:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    given = {key: each for key, each in value.items() if each is not None and each is not False}
    refuse_unknown({f"{name}.{key}": 0 for key in given}, {f"{name}.{key}" for key in (*_CONSTRAINTS, _OPTION)})
    names = [key for key in _CONSTRAINTS if key in given]
    if len(names) != 1:
        message = f"{name} must have exactly one of {', '.join(_CONSTRAINTS)}"
        raise invalid(message, param=name, code="invalid_value")
    compact = boolean({f"{name}.{_OPTION}": value.get(_OPTION)}, f"{name}.{_OPTION}") or False
    kind, source = _CONSTRAINTS[names[0]](f"{name}.{names[0]}", given[names[0]])
    return Grammar(kind=kind, source=source, parameter=name, any_whitespace=not compact)


def _json(name: str, value: Any) -> tuple[GrammarKind, str]:
    if not isinstance(value, dict | str):
        raise wrong_type(name, "an object or a string", value)
    return GrammarKind.JSON_SCHEMA, value if isinstance(value, str) else _encoded(value)


def _json_object(name: str, value: Any) -> tuple[GrammarKind, str]:
    boolean({name: value}, name)
    return GrammarKind.JSON_SCHEMA, _ANY_OBJECT


def _regex(name: str, value: Any) -> tuple[GrammarKind, str]:
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    return GrammarKind.REGEX, value


def _grammar(name: str, value: Any) -> tuple[GrammarKind, str]:
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    return GrammarKind.LARK, value


def _choice(name: str, value: Any) -> tuple[GrammarKind, str]:
    if not isinstance(value, list):
        raise wrong_type(name, "an array of strings", value)
    ensure_strings(name, value)
    if not value or not all(value):
        raise invalid(f"{name} must hold strings, and none that is empty", param=name, code="invalid_value")
    return GrammarKind.CHOICE, _encoded(value)


_CONSTRAINTS: Final = {
    "json": _json,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}


def _encoded(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _only(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


_TEXT: Final = {"type": "string"}
_SCHEMA: Final = _only(
    {
        "name": _TEXT,
        "description": {},
        "schema": {"type": "object"},
        "strict": {"type": ["boolean", "null"]},
    },
    *("name", "schema"),
)
_OPTIONS: Final = {_OPTION: {"type": ["boolean", "null"]}}
_OF_CONSTRAINTS: Final[Mapping[str, Any]] = {
    "json": {"type": ["object", "string"]},
    "json_object": {"const": True},
    "regex": _TEXT,
    "choice": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
    "grammar": _TEXT,
}
READERS: Final[Mapping[str, Reader[Grammar | None]]] = {
    "response_format": Reader(
        parse=_response_format,
        schema={
            "anyOf": [
                _only({"type": {"enum": ["text", "json_object"]}}, "type"),
                _only({"type": {"const": "json_schema"}, "json_schema": _SCHEMA}, "type", "json_schema"),
            ]
        },
    ),
    "structured_outputs": Reader(
        parse=_structured_outputs,
        schema={
            "anyOf": [
                _only(
                    {name: schema, **{other: {"enum": [None, False]} for other in _OF_CONSTRAINTS if other != name}}
                    | _OPTIONS,
                    name,
                )
                for name, schema in _OF_CONSTRAINTS.items()
            ]
        },
    ),
}


def read_grammar(body: Body, *, taken: Set[str]) -> Grammar | None:
    """Return what the output must keep to, None where that is nothing. Raises: ApiError, with the parameter named."""
    found = [
        grammar
        for name, read in READERS.items()
        if name in taken and not has_no_effect(body.get(name), COMPLETION_NEUTRAL[name])
        if (grammar := read(body, name)) is not None
    ]
    if len(found) > 1:
        message = "response_format and structured_outputs contradict each other; give one"
        raise invalid(message, param="structured_outputs", code="contradiction")
    return found[0] if found else None
