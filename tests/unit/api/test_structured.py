"""``response_format`` and ``structured_outputs`` are read as OpenAI and vLLM document them, or refused by name."""

import json
from typing import Any

import pytest

from engines.protocol import Grammar, GrammarKind
from flexpiped.api.errors import ApiError
from flexpiped.api.structured import STRUCTURED, read_grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
OF_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
NAMELESS = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}


def read(**body: Any) -> Grammar | None:
    return read_grammar(body, taken=STRUCTURED)


@pytest.mark.parametrize(
    ("body", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, GrammarKind.JSON_SCHEMA, {"type": "object"}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            GrammarKind.JSON_SCHEMA,
            SCHEMA,
        ),
        ({"structured_outputs": {"json": SCHEMA}}, GrammarKind.JSON_SCHEMA, SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, GrammarKind.JSON_SCHEMA, SCHEMA),
        ({"structured_outputs": {"json_object": True, "regex": None}}, GrammarKind.JSON_SCHEMA, {"type": "object"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, GrammarKind.CHOICE, ["a", "b"]),
    ],
)
def test_what_is_json(body: dict[str, Any], kind: GrammarKind, source: Any) -> None:
    found = read(**body)
    assert found is not None
    assert (found.kind, json.loads(found.source), found.parameter) == (kind, source, next(iter(body)))


@pytest.mark.parametrize(("name", "kind"), [("regex", GrammarKind.REGEX), ("grammar", GrammarKind.LARK)])
def test_expressions_and_grammars(name: str, kind: GrammarKind) -> None:
    found = read(structured_outputs={name: "a+", "disable_any_whitespace": True})
    assert found == Grammar(kind=kind, source="a+", parameter="structured_outputs", any_whitespace=False)


@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}}, {"response_format": None}])
def test_text_may_be_any(body: dict[str, Any]) -> None:
    assert read(**body) is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_object", "more": 1}}, "response_format.more"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ],
)
def test_what_is_wrong_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(**body)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("a", "must be an array of strings, not a string"),
        (["a", 1], "must hold strings, not an integer"),
        ([], "must hold strings, and none that is empty"),
        (["a", ""], "must hold strings, and none that is empty"),
    ],
)
def test_what_is_wrong_with_choices_is_said(choice: object, said: str) -> None:
    with pytest.raises(ApiError, match=f"^structured_outputs.choice {said}$"):
        read(structured_outputs={"choice": choice})
