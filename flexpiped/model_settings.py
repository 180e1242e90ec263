"""From one configuration to the settings of each model that it has. Pure.

The keys at the top describe one model. Each ``[models.NAME]`` table describes one that clients ask for as NAME; what
it does not say, the top says for it, but not what belongs to the model of the top: its files and its name. The model of
the top is served beside those of tables, unless it is the demo model, which is only there where nothing else is.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from flexpiped.models import served_name
from flexpiped.settings import DEMO_MODEL, Settings
from flexpiped.settings_keys import KEYS, Key, value_of, with_value

_SECTIONS: Final = ("engines", "handover", "workload", "slo", "planner", "auto")
_OF_THE_MODEL: Final = ("model", "revision", "tokenizer", "tool_format", "trust_remote_code")
_ADAPTERS: Final = ("engines", "native", "adapters")
_INHERITED: Final = ("engine", "stages", "dtype", "max_model_len", "sampling_defaults", "hf_token_file")
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
PER_MODEL: Final[Mapping[str, Key]] = {
    key.name: key
    for key in KEYS
    if key.name in (*_OF_THE_MODEL, *_INHERITED) or key.name.partition(".")[0] in _SECTIONS
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model that is configured. ``table``: the name of its table, empty for the model of the top."""

    table: str
    settings: Settings

    def with_path(self, path: str) -> "ModelSpec":
        """Return it with the files of another model, under the same name."""
        return replace(self, settings=replace(self.settings, model=path, revision=None, tokenizer=None))


def specs_of(settings: Settings) -> tuple[ModelSpec, ...]:
    """Return the models that are to be served, that of the top first."""
    top = (ModelSpec(table="", settings=replace(settings, models={})),) if serves_top(settings) else ()
    return (*top, *(ModelSpec(table=name, settings=_of_table(settings, name)) for name in settings.models))


def serves_top(settings: Settings) -> bool:
    """Whether the model of the top is served."""
    return settings.model != DEMO_MODEL or not settings.models


def _of_table(settings: Settings, name: str) -> Settings:
    defaults = Settings()
    own = replace(settings, models={}, served_model_name=name)
    for each in _OF_THE_MODEL:
        own = replace(own, **{each: getattr(defaults, each)})
    own = with_value(own, _ADAPTERS, defaults.engines.native.adapters)  # they fit one model
    for key, value in settings.models[name].items():
        own = with_value(own, PER_MODEL[key].path, value)
    return own


def needs_a_new_start(old: Settings, new: Settings) -> bool:
    """Whether a model must be started again to go from one to the other."""
    return any(not key.is_live and value_of(old, key) != value_of(new, key) for key in PER_MODEL.values())


def contradiction(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield keys of tables that cannot be, with what is wrong."""
    for name, table in settings.models.items():
        if "model" not in table:
            yield dotted("models", name), f"[{dotted('models', name)}] needs model: a directory or hub id"
    if serves_top(settings) and (top := served_name(settings, settings.model)) in settings.models:
        yield dotted("models", top), f"two models would be served as {top!r}: that of the top has this name, too"
    yield from _adapter_contradiction(specs_of(settings))


def _adapter_contradiction(specs: Iterable[ModelSpec]) -> Iterator[tuple[str, str]]:
    """Yield adapters that have the name of a model or of another's adapter: requests give one name for both."""
    specs = tuple(specs)
    names = Counter(spec.table or served_name(spec.settings, spec.settings.model) for spec in specs)
    names.update(name for spec in specs for name in spec.settings.engines.native.adapters)
    for spec in specs:
        for name in spec.settings.engines.native.adapters:
            if names[name] > 1:
                key = dotted(*(("models", spec.table) if spec.table else ()), *_ADAPTERS)
                yield key, f"{key}: {name!r} is the name of a model or of another adapter, too"


def entries(settings: Settings) -> dict[str, object]:
    """Return what all tables say, by dotted keys."""
    return {
        f"{dotted('models', name)}.{key}": value
        for name, table in settings.models.items()
        for key, value in table.items()
    }


def dotted(*names: str) -> str:
    """Return a dotted key of TOML; what is not bare there is quoted."""
    return ".".join(each if _BARE.fullmatch(each) else json.dumps(each, ensure_ascii=False) for each in names)


def schema_of_tables(root: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of ``models`` from that of the whole file: what a table may say and must say."""
    names = {name.partition(".")[0] for name in PER_MODEL}
    properties = {name: value for name, value in root["properties"].items() if name in names}
    table = {"type": "object", "additionalProperties": False, "properties": properties, "required": ["model"]}
    return {"type": "object", "additionalProperties": table, "description": "several models: applied by a reload"}
