"""Sampling parameters that some engines have besides the common ones, by vLLM's names: checked, then passed on.

Where the engine has none of them (``EngineCapabilities.takes_engine_params``), ``unsupported`` refuses them by name.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flexpiped.api.errors import invalid
from flexpiped.api.fields import Body, read_integer, read_number, read_token_ids, wrong_type
from flexpiped.api.unsupported import COMPLETION_NEUTRAL, has_no_effect

_MAX_TOKENS = 2**31 - 1
_MAX_BIAS = 100.0  # vLLM's route draws larger ones in


def read_engine_params(body: Body) -> dict[str, Any]:
    """Return those that are given and have an effect. Raises: ApiError, with the parameter named."""
    return {
        name: read(body, name)
        for name, read in ENGINE_PARAMETERS.items()
        if not has_no_effect(body.get(name), COMPLETION_NEUTRAL[name])
    }


def _logit_bias(body: Body, name: str) -> dict[str, float]:
    value = body[name]
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    biases = {}
    for token_id, bias in value.items():
        if not (token_id.isascii() and token_id.isdecimal()):
            raise invalid(f"{name} must have token ids as keys, not {token_id!r}", param=name, code="invalid_value")
        if not isinstance(bias, int | float) or isinstance(bias, bool):
            raise wrong_type(f"{name}[{token_id}]", "a number", bias)
        biases[token_id] = float(min(max(bias, -_MAX_BIAS), _MAX_BIAS))
    return biases


def _token_ids(body: Body, name: str) -> list[int]:
    value = body[name]
    if not isinstance(value, list):
        raise wrong_type(name, "an array of token ids", value)
    return list(read_token_ids(name, value))


def _words(body: Body, name: str) -> list[str]:
    value = body[name]
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise wrong_type(name, "an array of strings", value)
    return value


ENGINE_PARAMETERS: Mapping[str, Callable[[Body, str], Any]] = {
    "allowed_token_ids": _token_ids,
    "bad_words": _words,
    "frequency_penalty": partial(read_number, minimum=-2, maximum=2),
    "logit_bias": _logit_bias,
    "min_p": partial(read_number, minimum=0, maximum=1),
    "min_tokens": partial(read_integer, minimum=0, maximum=_MAX_TOKENS),
    "presence_penalty": partial(read_number, minimum=-2, maximum=2),
    "repetition_penalty": partial(read_number, minimum=0, maximum=1e6, above=True),
}
