"""What a request asks for: parsed and checked by plain functions, before anything else is done for it.

Every parameter is honoured, refused by name, or (``unsupported``) accepted where it changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.protocol import EngineCapabilities, SamplingParams
from flexpiped.api.engine_parameters import ENGINE_PARAMETERS, read_engine_params
from flexpiped.api.errors import ApiError, ErrorType, invalid
from flexpiped.api.fields import (
    Body,
    read_bool,
    read_integer,
    read_number,
    read_text,
    read_token_ids,
    refuse_unknown,
    wrong_type,
)
from flexpiped.api.inputs import read_messages, read_prompt
from flexpiped.api.unsupported import CHAT_NEUTRAL, COMPLETION_NEUTRAL, NeutralValues, refuse_unsupported

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's
MAX_STOP_STRINGS = 16
MAX_SEED = 2**63 - 1

_SHARED = {
    *("model", "stream", "stream_options", "user"),
    *("max_tokens", "temperature", "top_p", "top_k", "seed"),
    *("stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output"),
}
COMPLETION_NAMES = _SHARED | {"prompt"} | COMPLETION_NEUTRAL.keys()
CHAT_NAMES = _SHARED | {"messages", "max_completion_tokens"} | CHAT_NEUTRAL.keys()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What completions and chat have in common. None: not given, so a default that is not known yet."""

    model: str | None
    stream: bool
    include_usage: bool
    max_tokens: int | None
    max_tokens_name: str
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    include_stop: bool
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    engine_params: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    parameters: Parameters
    prompt: str | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """``messages`` have a role and a content each, nothing else."""

    parameters: Parameters
    messages: tuple[dict[str, str], ...]


def parse_completion(body: Body, *, takes_engine_params: bool = False) -> CompletionRequest:
    """Raises: ApiError, with the parameter named."""
    refuse_unknown(body, COMPLETION_NAMES)
    refuse_unsupported(body, _refused(COMPLETION_NEUTRAL, takes_engine_params))
    parameters = _parameters(body, chat=False, takes_engine_params=takes_engine_params)
    return CompletionRequest(prompt=read_prompt(body.get("prompt")), parameters=parameters)


def parse_chat(body: Body, *, takes_engine_params: bool = False) -> ChatRequest:
    """Raises: ApiError, with the parameter named."""
    refuse_unknown(body, CHAT_NAMES)
    refuse_unsupported(body, _refused(CHAT_NEUTRAL, takes_engine_params))
    parameters = _parameters(body, chat=True, takes_engine_params=takes_engine_params)
    return ChatRequest(messages=read_messages(body.get("messages")), parameters=parameters)


def _refused(neutral: NeutralValues, takes_engine_params: bool) -> NeutralValues:
    taken = ENGINE_PARAMETERS.keys() if takes_engine_params else ()
    return {name: values for name, values in neutral.items() if name not in taken}


def ensure_model(asked: str | None, *, served: str) -> None:
    """Raises: ApiError: 404, another model was asked for."""
    if asked is not None and asked != served:
        raise ApiError(
            status=404,
            type=ErrorType.NOT_FOUND,
            message=f"the model {asked!r} does not exist here; this server has {served!r}",
            param="model",
            code="model_not_found",
        )


def sampling_of(
    parameters: Parameters,
    *,
    prompt: tuple[int, ...],
    prompt_name: str,
    default_tokens: int | None,
    capabilities: EngineCapabilities,
    new_seed: int,
) -> SamplingParams:
    """Check prompt and parameters against the model and return what the engine is asked.

    Args:
        default_tokens: ``max_tokens`` where none is given; None stands for the rest of the context.
        new_seed: Used where no seed is given.

    Raises:
        ApiError: The prompt is empty, too long or outside the vocabulary, or the context is too short for it all.
    """
    _ensure_in_vocabulary(prompt_name, prompt, capabilities.vocab_size)
    _ensure_in_vocabulary("stop_token_ids", parameters.stop_token_ids, capabilities.vocab_size)
    if not prompt:
        raise invalid(f"{prompt_name} must give at least one token", param=prompt_name, code="invalid_value")
    limit, room = capabilities.max_model_len, capabilities.max_model_len - len(prompt)
    if room < 1:
        message = f"the context holds {limit} tokens, the prompt alone has {len(prompt)}"
        raise invalid(message, param=prompt_name, code="context_length_exceeded")
    if parameters.max_tokens is not None and parameters.max_tokens > room:
        message = (
            f"the context holds {limit} tokens, and {len(prompt)} of the prompt with {parameters.max_tokens} of the "
            f"output are {len(prompt) + parameters.max_tokens}"
        )
        raise invalid(message, param=parameters.max_tokens_name, code="context_length_exceeded")
    default = room if default_tokens is None else min(default_tokens, room)
    max_tokens = default if parameters.max_tokens is None else parameters.max_tokens
    min_tokens = parameters.engine_params.get("min_tokens", 0)
    if min_tokens > max_tokens:
        message = f"min_tokens {min_tokens} is more than the {max_tokens} tokens that the output may have"
        raise invalid(message, param="min_tokens", code="invalid_value")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=parameters.temperature,
        top_p=parameters.top_p,
        top_k=parameters.top_k,
        seed=new_seed if parameters.seed is None else parameters.seed & MAX_SEED,
        stop_token_ids=parameters.stop_token_ids,
        ignore_eos=parameters.ignore_eos,
        engine_params=parameters.engine_params,
    )


def _ensure_in_vocabulary(name: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        raise invalid(f"{name} must hold token ids from 0 to {vocab_size - 1}", param=name, code="invalid_value")


def _parameters(body: Body, *, chat: bool, takes_engine_params: bool) -> Parameters:
    stream = read_bool(body, "stream") or False
    max_tokens_name, max_tokens = _max_tokens(body, chat=chat)
    temperature = read_number(body, "temperature", minimum=0, maximum=2)
    top_p = read_number(body, "top_p", minimum=0, maximum=1, above=True)
    top_k = read_integer(body, "top_k", minimum=-1)
    stop_token_ids = body.get("stop_token_ids")
    if stop_token_ids is not None and not isinstance(stop_token_ids, list):
        raise wrong_type("stop_token_ids", "an array", stop_token_ids)
    read_text(body, "user")
    return Parameters(
        model=read_text(body, "model"),
        stream=stream,
        include_usage=_include_usage(body, stream=stream),
        max_tokens=max_tokens,
        max_tokens_name=max_tokens_name,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=max(top_k or 0, 0),  # -1 is vLLM's word for off
        seed=read_integer(body, "seed", minimum=-(2**63), maximum=MAX_SEED),
        stop=_stop(body.get("stop")),
        include_stop=read_bool(body, "include_stop_str_in_output") or False,
        stop_token_ids=read_token_ids("stop_token_ids", stop_token_ids or []),
        ignore_eos=read_bool(body, "ignore_eos") or False,
        engine_params=read_engine_params(body) if takes_engine_params else {},
    )


def _max_tokens(body: Body, *, chat: bool) -> tuple[str, int | None]:
    """Return the name under which it was given, and the value."""
    old = read_integer(body, "max_tokens", minimum=1)
    new = read_integer(body, "max_completion_tokens", minimum=1) if chat else None
    if old is not None and new is not None and old != new:
        message = f"max_tokens {old} and max_completion_tokens {new} contradict each other; give one"
        raise invalid(message, param="max_tokens", code="invalid_value")
    return ("max_tokens", old) if new is None else ("max_completion_tokens", new)


def _include_usage(body: Body, *, stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise wrong_type("stream_options", "an object", options)
    if not stream:
        raise invalid("stream_options needs stream: true", param="stream_options", code="invalid_value")
    known = {"include_usage", "include_obfuscation", "continuous_usage_stats"}
    prefixed = {f"stream_options.{name}": value for name, value in options.items()}
    refuse_unknown(prefixed, {f"stream_options.{name}" for name in known})
    refuse_unsupported(
        prefixed, {"stream_options.include_obfuscation": (False,), "stream_options.continuous_usage_stats": (False,)}
    )
    return read_bool(prefixed, "stream_options.include_usage") or False


def _stop(value: Any) -> tuple[str, ...]:
    stop = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stop, list):
        raise wrong_type("stop", "a string or an array of strings", value)
    if len(stop) > MAX_STOP_STRINGS:
        message = f"stop takes at most {MAX_STOP_STRINGS} strings, not {len(stop)}"
        raise invalid(message, param="stop", code="invalid_value")
    for item in stop:
        if not isinstance(item, str):
            raise wrong_type("stop", "a string or an array of strings", value)
        if not item:
            raise invalid("stop must not hold an empty string", param="stop", code="invalid_value")
    return tuple(stop)
