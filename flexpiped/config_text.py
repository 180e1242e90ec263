"""Settings as text: a configuration file of them all, and the JSON schema that editors check such files with."""

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from flexpiped.model_settings import entries, schema_of_tables
from flexpiped.settings import Settings
from flexpiped.settings_keys import KEYS, value_of


def toml_value(value: object) -> str:
    """Return a value of a setting as it stands in a file. None is the empty string there."""
    match value:
        case None:
            return '""'
        case Enum():
            return toml_value(value.value)
        case bool():
            return "true" if value else "false"
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False)  # what JSON escapes, TOML escapes alike
        case tuple() | list():
            return f"[{', '.join(map(toml_value, value))}]"
        case Mapping():
            inside = ", ".join(f"{toml_value(name)} = {toml_value(each)}" for name, each in value.items())
            return f"{{ {inside} }}" if inside else "{}"
        case _:
            return repr(value)


def settings_to_toml(settings: Settings) -> str:
    """Return a configuration file with every key, which reads back as ``settings``."""
    return "".join(f"{name} = {toml_value(value)}\n" for name, value in _all(settings).items())


def settings_to_wire(settings: Settings) -> dict[str, Any]:
    """Return every key by its dotted name, with its value as JSON."""
    return {name: _plain(value) for name, value in _all(settings).items()}


def _all(settings: Settings) -> dict[str, object]:
    return {key.name: value_of(settings, key) for key in KEYS} | entries(settings)


def schema() -> dict[str, Any]:
    """Return the JSON schema of configuration files, made from the definitions of the settings."""
    root = _table()
    defaults = settings_to_wire(Settings())
    for key in KEYS:
        *tables, name = key.name.split(".")
        table = root
        for each in tables:
            table = table["properties"].setdefault(each, _table())
        told = "applied by a reload" if key.is_live else "needs a restart"
        table["properties"][name] = {**key.read.schema, "default": defaults[key.name], "description": told}
    root["properties"]["models"] = schema_of_tables(root)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of flexpiped",
        **root,
    }


def _table() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _plain(value: object) -> Any:
    match value:
        case None:
            return ""
        case Enum():
            return value.value
        case Path():
            return str(value)
        case tuple():
            return list(value)
        case Mapping():
            return dict(value)
        case _:
            return value
