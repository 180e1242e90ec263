"""Values of a configuration file: one reader per kind. A reader returns the typed value or says what is allowed.

Each reader has the JSON schema of what it takes, which editors get with "flexctl config schema".
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from math import inf, isfinite
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
E = TypeVar("E", bound=Enum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader(Generic[T_co]):
    """Reads one kind of value; calling it raises ``WrongValue`` for any other."""

    parse: Callable[[object], T_co]
    schema: Mapping[str, Any]

    def __call__(self, value: object) -> T_co:
        return self.parse(value)


_UNITS: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class Auto(Enum):
    """The value ``"auto"``: flexpiped chooses."""

    AUTO = "auto"


class WrongValue(ValueError):
    """A value that a key cannot have; the message says what is allowed."""


def shown(value: object) -> str:
    """Return ``value`` as it would stand in a TOML file."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return f'"{value}"'
        case dict():
            return "a table"
        case list():
            return "an array"
        case _:
            return str(value)


def _boolean(value: object) -> bool:
    """Read ``true`` or ``false``."""
    if isinstance(value, bool):
        return value
    raise WrongValue(f"must be true or false, not {shown(value)}")


boolean: Final = Reader(parse=_boolean, schema={"type": "boolean"})


def integer(minimum: int, maximum: int | None = None) -> Reader[int]:
    """Return a reader of whole numbers from ``minimum`` to ``maximum``."""
    allowed = f"a whole number of at least {minimum}" if maximum is None else f"a whole number, {minimum} to {maximum}"

    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise WrongValue(f"must be {allowed}, not {shown(value)}")
        if value < minimum or (maximum is not None and value > maximum):
            raise WrongValue(f"must be {allowed}, not {value}")
        return value

    bounds = {"minimum": minimum} if maximum is None else {"minimum": minimum, "maximum": maximum}
    return Reader(parse=read, schema={"type": "integer", **bounds})


def _seconds(value: object) -> float:
    """Read a positive number of seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise WrongValue(f"must be a number of seconds above 0, not {shown(value)}")
    return float(value)


seconds: Final = Reader(parse=_seconds, schema={"type": "number", "exclusiveMinimum": 0})


def number(minimum: float, maximum: float | None = None, *, above: bool = False) -> Reader[float]:
    """Return a reader of numbers from ``minimum`` (or ``above`` it) to ``maximum``."""
    least = f"above {minimum:g}" if above else f"of at least {minimum:g}"
    allowed = f"a number {least}" if maximum is None else f"a number {least} and at most {maximum:g}"

    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise WrongValue(f"must be {allowed}, not {shown(value)}")
        within = (minimum < value if above else minimum <= value) and value <= (inf if maximum is None else maximum)
        if not within or not isfinite(value):
            raise WrongValue(f"must be {allowed}, not {value}")
        return float(value)

    bounds = {"exclusiveMinimum" if above else "minimum": minimum} | ({} if maximum is None else {"maximum": maximum})
    return Reader(parse=read, schema={"type": "number", **bounds})


def or_empty(reader: Reader[T]) -> Reader[T | None]:
    """Return a reader that takes the empty string, which means none, besides what ``reader`` takes."""

    def read(value: object) -> T | None:
        return None if value == "" else reader(value)

    return Reader(parse=read, schema={"anyOf": [{"const": ""}, reader.schema]})


optional_seconds: Final = or_empty(seconds)


def _text(value: object) -> str:
    """Read a string that is not empty."""
    if isinstance(value, str) and value.strip():
        return value
    raise WrongValue(f"must be a string that is not empty, not {shown(value)}")


text: Final = Reader(parse=_text, schema={"type": "string", "pattern": "\\S"})


def _optional_text(value: object) -> str | None:
    """Read a string; the empty one means none."""
    if isinstance(value, str):
        return value.strip() or None
    raise WrongValue(f"must be a string (empty for none), not {shown(value)}")


optional_text: Final = Reader(parse=_optional_text, schema={"type": "string"})


def _optional_path(value: object) -> Path | None:
    """Read a path, with ``~`` for the home directory; the empty string means none."""
    if isinstance(value, str):
        return Path(value.strip()).expanduser() if value.strip() else None
    raise WrongValue(f"must be a path (empty for none), not {shown(value)}")


optional_path: Final = Reader(parse=_optional_path, schema={"type": "string"})


def size_bytes(minimum: int) -> Reader[int]:
    """Return a reader of sizes: bytes, or a string with a unit (B, KB, MB, GB, TB, KiB, MiB, GiB, TiB)."""

    def read(value: object) -> int:
        size = _parse_size(value)
        if size is None:
            raise WrongValue(f'must be a size in bytes or with a unit, as in 67108864 or "64 MiB", not {shown(value)}')
        if size < minimum:
            raise WrongValue(f"must be at least {show_size(minimum)}, not {shown(value)}")
        return size

    worded = {"type": "string", "pattern": f"^{_SIZE.pattern}$"}
    return Reader(parse=read, schema={"anyOf": [{"type": "integer", "minimum": minimum}, worded]})


def _many_seconds(value: object) -> tuple[float, ...]:
    """Read an array of positive numbers of seconds, at least one."""
    if isinstance(value, list) and value:
        return tuple(seconds(each) for each in value)
    raise WrongValue(f"must be an array of numbers of seconds, not {shown(value)}")


many_seconds: Final = Reader(parse=_many_seconds, schema={"type": "array", "minItems": 1, "items": seconds.schema})


def _texts(value: object) -> tuple[str, ...]:
    """Read an array of strings."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    raise WrongValue(f"must be an array of strings, not {_part_shown(value)}")


texts: Final = Reader(parse=_texts, schema={"type": "array", "items": {"type": "string"}})


def _named_texts(value: object) -> Mapping[str, str]:
    """Read a table whose values are strings."""
    if isinstance(value, dict) and all(isinstance(each, str) for each in value.values()):
        return dict(value)
    raise WrongValue(f"must be a table of strings, not {_part_shown(value)}")


named_texts: Final = Reader(parse=_named_texts, schema={"type": "object", "additionalProperties": {"type": "string"}})


def choice(kind: type[E]) -> Reader[E]:
    """Return a reader of the values of an enumeration of strings."""

    def read(value: object) -> E:
        for member in kind:
            if member.value == value:
                return member
        allowed = " or ".join(shown(member.value) for member in kind)
        raise WrongValue(f"must be {allowed}, not {shown(value)}")

    return Reader(parse=read, schema={"enum": [member.value for member in kind]})


def or_auto(reader: Reader[T]) -> Reader[T | Auto]:
    """Return a reader that takes ``"auto"`` besides what ``reader`` takes."""

    def read(value: object) -> T | Auto:
        if value == Auto.AUTO.value:
            return Auto.AUTO
        try:
            return reader(value)
        except WrongValue as wrong:
            raise WrongValue(str(wrong).replace("must be ", 'must be "auto" or ', 1)) from None

    return Reader(parse=read, schema={"anyOf": [{"const": Auto.AUTO.value}, reader.schema]})


def show_size(size: int) -> str:
    """Return a size as it would be written in a configuration file."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]} {unit}"
    return f"{size} B"


def _part_shown(value: object) -> str:
    """Name what is wrong in an array or table: its first part that is not a string."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    wrong = [each for each in parts if not isinstance(each, str)]
    return f"{shown(value)} with {shown(wrong[0])}" if wrong else shown(value)


def _parse_size(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str) or (found := _SIZE.fullmatch(value)) is None:
        return None
    number, unit = found.groups()
    factor = _UNITS.get(unit or "B")
    return None if factor is None else round(float(number) * factor)
