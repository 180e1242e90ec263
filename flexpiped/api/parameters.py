"""What a request asks for: parsed and checked by plain functions, before anything else is done for it.

Every parameter is honoured, refused by name, or (``unsupported``) accepted where it changes nothing.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final

from engines.protocol import EngineCapabilities, Grammar, SamplingParams
from engines.text.wire import ChatOptions
from flexpiped.api.chat_options import CHAT_OPTIONS, read_chat_options
from flexpiped.api.choices import CHOICES, LOGPROBS, Choices, chat_choices, completion_choices
from flexpiped.api.engine_parameters import read_engine_params
from flexpiped.api.errors import ApiError, ErrorType, invalid
from flexpiped.api.fields import (
    Body,
    Reader,
    boolean,
    ensure_strings,
    integer,
    number,
    refuse_unknown,
    text,
    token_ids,
    wrong_type,
)
from flexpiped.api.inputs import MAX_PROMPTS, MESSAGES, PROMPT, Prompt, read_messages, read_prompts
from flexpiped.api.structured import STRUCTURED, read_grammar
from flexpiped.api.tools import TOOLS, Tools, read_tools
from flexpiped.api.unsupported import CHAT_NEUTRAL, COMPLETION_NEUTRAL, NeutralValues, refuse_unsupported

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's
MAX_STOP_STRINGS = 16
MAX_SEED = 2**63 - 1
_NO_SEED: Final = -1  # vLLM's word for none, which user interfaces send
_MAX_COUNT: Final = 2**31 - 1


def _stop(_name: str, value: Any) -> tuple[str, ...]:
    stop = [value] if isinstance(value, str) else value
    if not isinstance(stop, list):
        raise wrong_type("stop", "a string or an array of strings", value)
    if len(stop) > MAX_STOP_STRINGS:
        message = f"stop takes at most {MAX_STOP_STRINGS} strings, not {len(stop)}"
        raise invalid(message, param="stop", code="invalid_value")
    ensure_strings("stop", stop)
    if not all(stop):
        raise invalid("stop must not hold an empty string", param="stop", code="invalid_value")
    return tuple(stop)


_STREAM_OPTIONS: Final[NeutralValues] = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}


def _stream_options(name: str, value: Any) -> bool:
    """Return whether the usage is asked for."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    options = {f"{name}.{key}": each for key, each in value.items()}
    neutral = {f"{name}.{key}": values for key, values in _STREAM_OPTIONS.items()}
    refuse_unknown(options, {f"{name}.include_usage", *neutral})
    refuse_unsupported(options, neutral)
    return boolean(options, f"{name}.include_usage") or False


_ONE_STOP: Final = {"type": "string", "minLength": 1}
_SHARED: Final[Mapping[str, Reader[Any]]] = {
    "model": text,
    "stream": boolean,
    "stream_options": Reader(
        parse=_stream_options,
        schema={
            "type": "object",
            "properties": {"include_usage": {"type": ["boolean", "null"]}}
            | {name: {"enum": [None, *values]} for name, values in _STREAM_OPTIONS.items()},
            "additionalProperties": False,
        },
    ),
    "user": text,
    "max_tokens": integer(1, _MAX_COUNT),
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": integer(-1, _MAX_COUNT),
    "seed": integer(-(2**63), MAX_SEED),
    "stop": Reader(
        parse=_stop,
        schema={"anyOf": [_ONE_STOP, {"type": "array", "items": _ONE_STOP, "maxItems": MAX_STOP_STRINGS}]},
    ),
    "stop_token_ids": token_ids,
    "ignore_eos": boolean,
    "include_stop_str_in_output": boolean,
}
_OF_CHAT: Final = {"max_completion_tokens": integer(1, _MAX_COUNT), **_SHARED}
# 0, with ``echo``: only the prompt is wanted, with its log-probabilities
_OF_COMPLETIONS: Final = {**_SHARED, "max_tokens": integer(0, _MAX_COUNT)}
COMPLETION_READERS: Final[Mapping[str, Reader[Any]]] = {"prompt": PROMPT, **_OF_COMPLETIONS}
CHAT_READERS: Final[Mapping[str, Reader[Any]]] = {"messages": MESSAGES, **_OF_CHAT}
COMPLETION_NAMES: Final = COMPLETION_READERS.keys() | COMPLETION_NEUTRAL.keys()
CHAT_NAMES: Final = CHAT_READERS.keys() | CHAT_NEUTRAL.keys()


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
    choices: Choices
    grammar: Grammar | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    parameters: Parameters
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """``messages`` have a role and a content each, and what they say of tools. ``tools`` None: none are offered."""

    parameters: Parameters
    messages: tuple[dict[str, Any], ...]
    tools: Tools | None = None
    options: ChatOptions = field(default_factory=ChatOptions)


def taken_here(capabilities: EngineCapabilities | None, *, calls_tools: bool = False) -> frozenset[str]:
    """Return the parameters that are honoured with this engine, besides those that are with every one.

    What an engine's own server does as well is left to that: it has more of the kind.

    Args:
        calls_tools: It is known how the model calls tools.
    """
    if capabilities is None:
        return frozenset()
    choices = CHOICES | CHAT_OPTIONS if capabilities.own_server is None else frozenset()
    logprobs = LOGPROBS if capabilities.own_server is None and capabilities.top_logprobs else frozenset()
    structured = STRUCTURED if capabilities.own_server is None and capabilities.grammars else frozenset()
    tools = TOOLS if structured and calls_tools else frozenset()
    return capabilities.engine_params | choices | logprobs | structured | tools


def parse_completion(body: Body, *, taken: Set[str] = frozenset()) -> CompletionRequest:
    """Read what ``taken`` and all engines honour. Raises: ApiError, with the parameter named."""
    refuse_unknown(body, COMPLETION_NAMES)
    refuse_unsupported(body, COMPLETION_NEUTRAL, taken=taken)
    parameters = _parameters(body, _OF_COMPLETIONS, completion_choices, taken=taken)
    if parameters.max_tokens == 0 and not parameters.choices.echo:
        raise invalid("max_tokens 0 goes with echo: true only", param="max_tokens", code="contradiction")
    prompts = read_prompts(body.get("prompt"))
    if len(prompts) * parameters.choices.best_of > MAX_PROMPTS:
        message = f"{len(prompts)} prompts of {parameters.choices.best_of} choices each are more than {MAX_PROMPTS}"
        raise invalid(message, param="prompt", code="invalid_value")
    return CompletionRequest(prompts=prompts, parameters=parameters)


def parse_chat(body: Body, *, taken: Set[str] = frozenset()) -> ChatRequest:
    """Read what ``taken`` and all engines honour. Raises: ApiError, with the parameter named."""
    refuse_unknown(body, CHAT_NAMES)
    refuse_unsupported(body, CHAT_NEUTRAL, taken=taken - {"echo"})
    parameters = _parameters(body, _OF_CHAT, chat_choices, taken=taken)
    tools = read_tools(body, taken=taken, grammar=parameters.grammar)
    messages = read_messages(body.get("messages"), with_tools=taken >= TOOLS)
    options = read_chat_options(body, taken=taken)
    return ChatRequest(messages=messages, parameters=parameters, tools=tools, options=options)


def ensure_model(asked: str | None, *, served: str, adapters: Sequence[str] = ()) -> None:
    """Raises: ApiError: 404, another model was asked for, and no adapter of it."""
    if asked is not None and asked != served and asked not in adapters:
        raise ApiError(
            status=404,
            type=ErrorType.NOT_FOUND,
            message=f"the model {asked!r} does not exist here; this server has "
            + ", ".join(repr(name) for name in (served, *adapters)),
            param="model",
            code="model_not_found",
        )


def ensure_generates(capabilities: EngineCapabilities, *, model: str) -> None:
    """Return where the model generates. Raises: ApiError."""
    if not capabilities.generates:
        raise ApiError(
            status=404,
            type=ErrorType.NOT_FOUND,
            message=(
                f"{model} generates nothing: the {capabilities.name} engine has it to embed, classify or score, "
                "for /v1/embeddings and what else the engine's own server answers of these"
            ),
            code="model_does_not_generate",
        )


def sampling_of(
    parameters: Parameters,
    *,
    prompt: tuple[int, ...],
    prompt_name: str,
    default_tokens: int | None,
    capabilities: EngineCapabilities,
    new_seed: int,
    bad_words: tuple[tuple[int, ...], ...] = (),
    adapter: str = "",
) -> SamplingParams:
    """Check prompt and parameters against the model and return what the engine is asked.

    Args:
        default_tokens: ``max_tokens`` where none is given; None stands for the rest of the context.
        new_seed: Used where no seed is given.
        bad_words: Those of the request, as tokens.
        adapter: Whose name was given for the model's.

    Raises:
        ApiError: The prompt is empty, too long or outside the vocabulary, or the context is too short for it all.
    """
    ensure_in_vocabulary(prompt_name, prompt, capabilities.vocab_size)
    ensure_in_vocabulary("stop_token_ids", parameters.stop_token_ids, capabilities.vocab_size)
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
    max_tokens = default if parameters.max_tokens is None else max(parameters.max_tokens, 1)
    min_tokens = parameters.engine_params.get("min_tokens", 0)
    if min_tokens > max_tokens:
        message = f"min_tokens {min_tokens} is more than the {max_tokens} tokens that the output may have"
        raise invalid(message, param="min_tokens", code="contradiction")
    choices = parameters.choices
    prompt_logprobs = choices.prompt_logprobs
    if choices.echo and choices.logprobs is not None:
        prompt_logprobs = max(choices.logprobs, prompt_logprobs or 0)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=parameters.temperature,
        top_p=parameters.top_p,
        top_k=parameters.top_k,
        seed=new_seed if parameters.seed is None else parameters.seed & MAX_SEED,
        stop_token_ids=parameters.stop_token_ids,
        ignore_eos=parameters.ignore_eos,
        logprobs=choices.logprobs is not None or choices.best_of > choices.n,
        top_logprobs=choices.logprobs or 0,
        prompt_logprobs=prompt_logprobs,
        bad_words=bad_words,
        grammar=parameters.grammar,
        adapter=adapter,
        engine_params=parameters.engine_params,
    )


def ensure_in_vocabulary(name: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        raise invalid(f"{name} must hold token ids from 0 to {vocab_size - 1}", param=name, code="invalid_value")


def _parameters(
    body: Body, readers: Mapping[str, Reader[Any]], read_choices: Callable[..., Choices], *, taken: Set[str]
) -> Parameters:
    given = {name: read(body, name) for name, read in readers.items()}
    max_tokens_name, max_tokens = _max_tokens(given)
    stream = given["stream"] or False
    if given["stream_options"] is not None and not stream:
        raise invalid("stream_options needs stream: true", param="stream_options", code="invalid_value")
    return Parameters(
        model=given["model"],
        stream=stream,
        include_usage=given["stream_options"] or False,
        max_tokens=max_tokens,
        max_tokens_name=max_tokens_name,
        temperature=1.0 if given["temperature"] is None else given["temperature"],
        top_p=1.0 if given["top_p"] is None else given["top_p"],
        top_k=max(given["top_k"] or 0, 0),  # -1 is vLLM's word for off
        seed=None if given["seed"] == _NO_SEED else given["seed"],
        stop=given["stop"] or (),
        include_stop=given["include_stop_str_in_output"] or False,
        stop_token_ids=given["stop_token_ids"] or (),
        ignore_eos=given["ignore_eos"] or False,
        engine_params=read_engine_params(body, taken=taken),
        choices=read_choices(body, taken=taken, stream=stream),
        grammar=read_grammar(body, taken=taken),
    )


def _max_tokens(given: Mapping[str, Any]) -> tuple[str, int | None]:
    """Return the name under which it was given, and the value."""
    old, new = given["max_tokens"], given.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        message = f"max_tokens {old} and max_completion_tokens {new} contradict each other; give one"
        raise invalid(message, param="max_tokens", code="contradiction")
    return ("max_tokens", old) if new is None else ("max_completion_tokens", new)
