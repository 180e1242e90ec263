"""Calls as Qwen3-Coder writes them, as rules of a grammar: parameters in the order of their schema, each as it must be.

What may be a string is free text, as it has no quotes there; where it is one of a few, it is one of these. Pure.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from flexpiped.api.tagged_call import choices_of, properties_of, resolved, types_of

_END: Final = json.dumps("\n</parameter>\n")
# Of all such calls; what is free ends with the parameter.
SHARED: Final = (
    f"free[lazy]: ANY {_END}",
    r"ANY: /(.|\n)*/",
    f'any_parameter: "<parameter=" KEY {json.dumps(">" + chr(10))} free',
    r"KEY: /[^>\n]+/",
)


def rules_of_call(rule: str, name: str, schema: Mapping[str, Any], *, is_open: bool) -> list[str]:
    """Return the rule of one call, and those that it needs besides ``SHARED``.

    Args:
        is_open: The arguments may be any.
    """
    head, end = json.dumps(f"<function={name}>\n"), json.dumps("</function>")
    properties, needed = properties_of(schema), schema.get("required")
    if is_open or (not properties and schema.get("additionalProperties") is not False):
        return [f"{rule}: {head} any_parameter* {end}"]
    required = needed if isinstance(needed, list) else []
    parts, rules = list[str](), list[str]()
    for index, (key, value) in enumerate(properties.items()):
        part = f"{rule}_{index}"
        parts.append(part if key in required else f"{part}?")
        rules.append(f"{part}: {json.dumps(f'<parameter={key}>{chr(10)}')} {_value(value, schema)}")
    return [f"{rule}: {' '.join([head, *parts, end])}", *rules]


def _value(schema: Any, whole: Mapping[str, Any]) -> str:
    """Return what a value is, with the end of its parameter."""
    found = resolved(schema, whole)
    choices = choices_of(found)
    if choices and all(isinstance(each, str) for each in choices):
        return f"({' | '.join(json.dumps(each, ensure_ascii=False) for each in choices)}) {_END}"
    types = types_of(found)
    if not types or "string" in types:
        return "free"
    shared = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
    spaced = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
    return f"%json {json.dumps({**shared, **found, 'x-guidance': spaced})} {_END}"
