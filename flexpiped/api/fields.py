"""Reading single fields of a JSON object: absent and null are one, and what is wrong is said by name.

What reads a value has its JSON schema too, from which ``/openapi.json`` is made. All functions raise ``ApiError`` with
status 400 and the parameter's name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec

from flexpiped.api.errors import invalid

Body = Mapping[str, Any]
_GUIDED: Final = ("json", "regex", "choice", "grammar")
_OF_OLD: Final = {f"guided_{kind}": f'structured_outputs: {{"{kind}": ...}}' for kind in _GUIDED}
T_co = TypeVar("T_co", covariant=True)


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a request body."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"the body is not valid JSON: {error}", param=None, code="invalid_json") from None
    if not isinstance(body, dict):
        raise invalid(f"the body must be a JSON object, not {name_of(body)}", param=None, code="invalid_json")
    return body


def name_of(value: object) -> str:
    """Return what JSON calls this type."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def refuse_unknown(body: Body, known: Iterable[str]) -> None:
    for name in body:
        if name not in known:
            hint = f"; vLLM has it no more, give {_OF_OLD[name]}" if name in _OF_OLD else ""
            raise invalid(f"unknown parameter: {name}{hint}", param=name, code="unknown_parameter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader(Generic[T_co]):
    """Reads one kind of value, and has the JSON schema of what it takes.

    ``parse`` gets the parameter's name and a value that is not null.
    """

    parse: Callable[[str, Any], T_co]
    schema: Mapping[str, Any]

    def __call__(self, body: Body, name: str) -> T_co | None:
        """Return the value that ``body`` has under ``name``, None where it has none."""
        value = body.get(name)
        return None if value is None else self.parse(name, value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(name, "a boolean", value)
    return value


boolean: Final = Reader(parse=_boolean, schema={"type": "boolean"})


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    return value


text: Final = Reader(parse=_text, schema={"type": "string"})


def _whole(value: Any) -> Any:
    """Return 5 for 5.0: to JSON schemas, and to vLLM, it is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def integer(minimum: int, maximum: int) -> Reader[int]:
    """Return a reader of whole numbers from ``minimum`` to ``maximum``."""

    def read(name: str, value: Any) -> int:
        value = _whole(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong_type(name, "an integer", value)
        if not minimum <= value <= maximum:
            raise invalid(
                f"{name} must be between {minimum} and {maximum}, not {value}", param=name, code="invalid_value"
            )
        return value

    return Reader(parse=read, schema={"type": "integer", "minimum": minimum, "maximum": maximum})


def number(minimum: float, maximum: float, *, above: bool = False) -> Reader[float]:
    """Return a reader of numbers from ``minimum`` (or, with ``above``, greater than it) to ``maximum``."""

    def read(name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise wrong_type(name, "a number", value)
        if not minimum <= value <= maximum or (above and value == minimum):
            bounds = f"above {minimum:g} and at most {maximum:g}" if above else f"between {minimum:g} and {maximum:g}"
            raise invalid(f"{name} must be {bounds}, not {value}", param=name, code="invalid_value")
        return float(value)

    least = "exclusiveMinimum" if above else "minimum"
    return Reader(parse=read, schema={"type": "number", least: minimum, "maximum": maximum})


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Read token ids; whether the vocabulary has them is checked where it is known."""
    if not isinstance(value, list):
        raise wrong_type(name, "an array of token ids", value)
    found = tuple(map(_whole, value))
    for item in found:
        if not isinstance(item, int) or isinstance(item, bool):
            raise invalid(f"{name} must hold token ids, not {name_of(item)}", param=name, code="invalid_type")
    return found


TOKEN_ID: Final[Mapping[str, Any]] = {"type": "integer", "minimum": 0}  # the description sets the vocabulary's bound
token_ids: Final = Reader(parse=_token_ids, schema={"type": "array", "items": TOKEN_ID})


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise wrong_type(name, "an array of strings", value)
    ensure_strings(name, value)
    return tuple(value)


strings: Final = Reader(parse=_strings, schema={"type": "array", "items": {"type": "string"}})


def ensure_strings(name: str, value: Sequence[object]) -> None:
    """Raises: ApiError, for the first item of an array that is no string."""
    for item in value:
        if not isinstance(item, str):
            raise invalid(f"{name} must hold strings, not {name_of(item)}", param=name, code="invalid_type")


def wrong_type(name: str, wanted: str, value: object) -> Exception:
    return invalid(f"{name} must be {wanted}, not {name_of(value)}", param=name, code="invalid_type")
