"""Sampling parameters that some engines have besides the common ones, by vLLM's names: checked, then passed on.

Those that the engine has not (``EngineCapabilities.engine_params``), ``unsupported`` refuses by name.
"""

from collections.abc import Mapping, Set
from typing import Any, Final

from flexpiped.api.errors import invalid
from flexpiped.api.fields import Body, Reader, integer, number, strings, token_ids, wrong_type
from flexpiped.api.unsupported import COMPLETION_NEUTRAL, has_no_effect

_MAX_TOKENS: Final = 2**31 - 1
_MAX_DIGITS: Final = len(str(_MAX_TOKENS))  # of a token id; Python reads no number of more than 4300
_MAX_BIAS: Final = 100.0  # vLLM's route draws larger ones in
_MAX_BAD_WORDS: Final = 128  # as vLLM's: each is looked for at each token


def read_engine_params(body: Body, *, taken: Set[str]) -> dict[str, Any]:
    """Return those of ``taken`` that are given and have an effect, as JSON values.

    Raises:
        ApiError: The parameter is named.
    """
    given = {
        name: read(body, name)
        for name, read in ENGINE_PARAMETERS.items()
        if name in taken and not has_no_effect(body.get(name), COMPLETION_NEUTRAL[name])
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _bad_words(name: str, value: Any) -> tuple[str, ...]:
    words = strings.parse(name, value)
    if len(words) > _MAX_BAD_WORDS:
        message = f"{name} takes at most {_MAX_BAD_WORDS} words, not {len(words)}"
        raise invalid(message, param=name, code="invalid_value")
    if not all(map(str.lstrip, words)):  # as tokens they are taken without the space before them, as in vLLM
        raise invalid(f"{name} must not hold an empty string or one of spaces alone", param=name, code="invalid_value")
    return words


def _logit_bias(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    biases = {}
    for token_id, bias in value.items():
        if not (token_id.isascii() and token_id.isdecimal()):
            raise invalid(f"{name} must have token ids as keys, not {token_id!r}", param=name, code="invalid_value")
        if len(token_id) > _MAX_DIGITS:
            message = f"{name}: no token id has {len(token_id)} digits"
            raise invalid(message, param=name, code="unknown_token")
        if not isinstance(bias, int | float) or isinstance(bias, bool):
            raise wrong_type(f"{name}[{token_id}]", "a number", bias)
        biases[token_id] = float(min(max(bias, -_MAX_BIAS), _MAX_BIAS))
    return biases


ENGINE_PARAMETERS: Final[Mapping[str, Reader[Any]]] = {
    "allowed_token_ids": token_ids,
    "bad_words": Reader(
        parse=_bad_words,
        schema={"type": "array", "items": {"type": "string", "pattern": r"\S"}, "maxItems": _MAX_BAD_WORDS},
    ),
    "frequency_penalty": number(-2, 2),
    "logit_bias": Reader(
        parse=_logit_bias,
        schema={
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": {"type": "number"},
        },
    ),
    "min_p": number(0, 1),
    "min_tokens": integer(0, _MAX_TOKENS),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(0, 1e6, above=True),
}
