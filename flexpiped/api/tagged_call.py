"""One call of a tool as Qwen3-Coder writes it, made JSON as it comes: a parameter when it is whole. Pure.

<function=paint>
<parameter=colour>
red
</parameter>
</function>

A value is text; what it is in JSON is told from the schema of its parameter.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

FUNCTION: Final = re.compile(r"<function=([^>\n]{1,64})>")
FUNCTION_BEGUN: Final = re.compile(r"<function=[^>\n]{0,64}")
_TAG: Final = re.compile(r"<parameter=([^>\n]+)>|</function>|</tool_call>")  # the last: the one before it is missing
_END: Final = "</parameter>"
_AS_PYTHON_HAS_IT: Final = {"True": "true", "False": "false", "None": "null"}
_TYPES: Final = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}


class TaggedCall:
    """From behind the name to the end of the function.

    Args:
        schema: Of the arguments.
    """

    def __init__(self, *, name: str, schema: Mapping[str, Any]) -> None:
        self.name = name
        self.text = ""
        self.index: int | None = None
        self.is_whole = False
        self.is_of_others = False
        self._schema = schema
        self._read = 0
        self._given: set[str] = set()
        self._new = "{"

    def take(self, text: str) -> int:
        """Take what of ``text`` belongs to the call; return how much that is."""
        before = len(self.text)
        self.text += text
        while not self.is_whole and (tag := _TAG.search(self.text, self._read)) is not None:
            end = tag.end() if tag[1] is None else self.text.find(_END, tag.end())
            if end < 0:
                break
            self.is_whole = tag[1] is None
            if tag[1] is not None:
                self._add(tag[1], self.text[tag.end() : end])
                end += len(_END)
            self._read = end
        if self.is_whole:
            self._new += "}"
            self.text = self.text[: self._read]
        return len(self.text) - before

    def new_arguments(self) -> str:
        """Return what has come of the arguments since the last time."""
        new, self._new = self._new, ""
        return new

    def _add(self, name: str, value: str) -> None:
        if name in self._given:
            return
        value = value.removeprefix("\n").removesuffix("\n")
        comma = ", " if self._given else ""
        schema = resolved(properties_of(self._schema).get(name), self._schema)
        self._new += f"{comma}{json.dumps(name, ensure_ascii=False)}: {_as_json(value, schema)}"
        self._given.add(name)


def _as_json(value: str, schema: object) -> str:
    """Return a value as JSON: as it is written where it is JSON of a type that it may have, else as a string."""
    types = types_of(schema)
    word = _AS_PYTHON_HAS_IT.get(value.strip(), value.strip())
    if types != {"string"}:
        try:
            found = json.loads(word, parse_constant=_refuse)
        except (ValueError, RecursionError):
            pass
        else:
            kind = "null" if found is None else _TYPES[type(found)]
            if not types or kind in types or (kind == "integer" and "number" in types):
                return word
    return json.dumps(value, ensure_ascii=False)


def resolved(schema: Any, whole: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema in place of a reference to it; an empty one where it is none, or is elsewhere."""
    found: Any = schema
    if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
        found = whole
        for step in schema["$ref"].removeprefix("#/").split("/"):
            found = found.get(step) if isinstance(found, dict) else None
    return found if isinstance(found, dict) and "$ref" not in found else {}


def types_of(schema: object) -> set[str]:
    """Return the types that a schema leaves a value; none where it does not say."""
    if not isinstance(schema, dict):
        return set()
    if (said := schema.get("type")) is not None:
        return {each for each in (said if isinstance(said, list) else [said]) if isinstance(each, str)}
    if (values := choices_of(schema)) is not None:
        return {"null" if each is None else _TYPES[type(each)] for each in values}
    ways = schema.get("anyOf") or schema.get("oneOf")
    several = [types_of(each) for each in ways] if isinstance(ways, list) else []
    return set().union(*several) if all(several) else set()


def choices_of(schema: Mapping[str, Any]) -> list[Any] | None:
    """Return the values that there are, None where the schema does not list them."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return values if isinstance(values, list) else None


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schemas of the parameters by name. What clients send need not be a schema."""
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
