"""How a model's makers want it sampled, for requests that do not say it: ``generation_config.json``, as vLLM takes it.

Like vLLM's server, and unlike transformers, this does not look at ``do_sample``.
"""

from collections.abc import Mapping
from typing import Any, Final

from engines.protocol import EngineCapabilities
from flexpiped.api.engine_parameters import ENGINE_PARAMETERS
from flexpiped.api.errors import ApiError
from flexpiped.api.fields import Body, Reader
from flexpiped.api.parameters import CHAT_READERS, COMPLETION_READERS

_COMMON: Final = ("temperature", "top_p", "top_k")  # every engine has these
_SOME: Final = ("frequency_penalty", "min_p", "presence_penalty", "repetition_penalty")
MAX_TOKENS: Final = "max_tokens"  # of chats: a completion has 16 by default, whatever the model
_MAX_NEW_TOKENS: Final = "max_new_tokens"  # how transformers calls them
_READERS: Final[Mapping[str, Reader[Any]]] = {name: COMPLETION_READERS[name] for name in _COMMON} | {
    name: ENGINE_PARAMETERS[name] for name in _SOME
}


def sampling_defaults(generation_config: Mapping[str, object]) -> dict[str, Any]:
    """Return the sampling parameters that a ``generation_config.json`` gives, by the API's names.

    Raises:
        ValueError: A request could not give such a value; says which and why.
    """
    try:
        given = {name: read(generation_config, name) for name, read in _READERS.items()}
        given[MAX_TOKENS] = CHAT_READERS[MAX_TOKENS](generation_config, _MAX_NEW_TOKENS)
    except ApiError as refusal:
        raise ValueError(f"generation_config.json: {refusal.message}") from None
    return {name: value for name, value in given.items() if value is not None}


def with_defaults(body: Body, defaults: Mapping[str, Any], capabilities: EngineCapabilities | None) -> Body:
    """Return the body with those of ``defaults`` that it does not give and that the engine honours."""
    taken = {*_COMMON, *(capabilities.engine_params if capabilities is not None else ())}
    missing = {name: value for name, value in defaults.items() if name in taken and body.get(name) is None}
    return {**body, **missing} if missing else body
