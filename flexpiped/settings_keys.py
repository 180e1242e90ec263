"""The keys of a configuration file, as the annotations of the settings say: found, read from settings and put there."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Final, TypeVar, cast, get_type_hints

from flexpiped.config_values import Reader
from flexpiped.settings import Live, Named, Settings, Tables

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of the configuration file: its dotted TOML name, the way to its field, and how its value is read.

    ``is_live``: a reload applies it.
    """

    name: str
    path: tuple[str, ...]
    read: Reader[object]
    is_live: bool


def _keys_of(section: type, *, names: tuple[str, ...], path: tuple[str, ...], is_live: bool = False) -> Iterator[Key]:
    hints = get_type_hints(section, include_extras=True)
    for each in fields(section):
        hint, here = hints[each.name], (*path, each.name)
        more: tuple[object, ...] = getattr(hint, "__metadata__", ())
        if any(isinstance(word, Tables) for word in more):
            continue
        live = is_live or any(isinstance(word, Live) for word in more)
        kind = getattr(hint, "__origin__", hint)
        if is_dataclass(kind):
            yield from _keys_of(cast("type", kind), names=(*names, each.name), path=here, is_live=live)
            continue
        read = next(word for word in more if isinstance(word, Reader))
        word = next((word.word for word in more if isinstance(word, Named)), each.name)
        yield Key(name=".".join((*names, word)), path=here, read=read, is_live=live)


KEYS: Final[tuple[Key, ...]] = tuple(_keys_of(Settings, names=(), path=()))


def value_of(settings: Settings, key: Key) -> object:
    """Return what ``settings`` say for ``key``."""
    value: object = settings
    for name in key.path:
        value = getattr(value, name)
    return value


def with_value(section: T, path: tuple[str, ...], value: object) -> T:
    """Return a copy of ``section`` (settings or a part of them) with the field at ``path`` replaced."""
    first, *rest = path
    new = with_value(getattr(section, first), tuple(rest), value) if rest else value
    return cast("T", replace(cast("Any", section), **{first: new}))
