"""Reading single fields of a JSON object: absent and null are one, and what is wrong is said by name.

All functions raise ``ApiError`` with status 400 and the parameter's name.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from flexpiped.api.errors import invalid

Body = Mapping[str, Any]


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
            raise invalid(f"unknown parameter: {name}", param=name, code="unknown_parameter")


def read_bool(body: Body, name: str) -> bool | None:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong_type(name, "a boolean", value)
    return value


def read_text(body: Body, name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    return value


def read_integer(body: Body, name: str, *, minimum: int, maximum: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(name, "an integer", value)
    if value < minimum or (maximum is not None and value > maximum):
        bounds = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise invalid(f"{name} must be {bounds}, not {value}", param=name, code="invalid_value")
    return value


def read_number(body: Body, name: str, *, minimum: float, maximum: float, above: bool = False) -> float | None:
    """Read a number from ``minimum`` (or, with ``above``, greater than it) to ``maximum``."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong_type(name, "a number", value)
    if not minimum <= value <= maximum or (above and value == minimum):
        bounds = f"above {minimum:g} and at most {maximum:g}" if above else f"between {minimum:g} and {maximum:g}"
        raise invalid(f"{name} must be {bounds}, not {value}", param=name, code="invalid_value")
    return float(value)


def read_token_ids(name: str, value: list[Any]) -> tuple[int, ...]:
    """Read token ids; whether the vocabulary has them is checked where it is known."""
    for item in value:
        if not isinstance(item, int) or isinstance(item, bool):
            raise invalid(f"{name} must hold token ids, not {name_of(item)}", param=name, code="invalid_type")
    return tuple(value)


def wrong_type(name: str, wanted: str, value: object) -> Exception:
    return invalid(f"{name} must be {wanted}, not {name_of(value)}", param=name, code="invalid_type")
