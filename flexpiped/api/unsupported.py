"""Parameters of OpenAI's API (or vLLM's) that are not honoured here: accepted only where they change nothing.

Some of them an engine may honour: those of ``engine_parameters``, and those that its own server knows (``routing``).
"""

from collections.abc import Mapping, Set
from typing import Any

from flexpiped.api.errors import invalid
from flexpiped.api.fields import Body

NeutralValues = Mapping[str, tuple[Any, ...]]  # besides null, which is always neutral

_BOTH: NeutralValues = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "ec_transfer_params": ({},),
    "frequency_penalty": (0,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprob_token_ids": ([],),
    "min_p": (0,),
    "min_tokens": (0,),
    "mm_payload": ("tensors",),
    "n": (1,),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "repetition_penalty": (1,),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_mm_kwargs": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "session_id": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
COMPLETION_NEUTRAL: NeutralValues = {
    **_BOTH,
    "add_special_tokens": (True,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "prompt_embeds": (),
    "suffix": (),
}
CHAT_NEUTRAL: NeutralValues = {
    **_BOTH,
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True,),
    "logprobs": (False,),
    "media_io_kwargs": ({},),
    "metadata": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "return_prompt_text": (False,),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

_BECAUSE: Mapping[str, str] = {
    "tools": " with this model and engine: its chat template shows no calls of a form that is known here (see "
    "tool_format in the configuration), or its output cannot be kept to grammars"
}


def refuse_unsupported(body: Body, neutral: NeutralValues, *, taken: Set[str] = frozenset()) -> None:
    """Return when every parameter of ``neutral`` but those ``taken`` is absent or has no effect.

    Raises:
        ApiError: 400, naming the parameter.
    """
    for name, value in body.items():
        values = None if name in taken else neutral.get(name)
        if values is None or has_no_effect(value, values):
            continue
        hint = "; leave it out" if not values else f"; leave it out or give {_shown(values[0])}"
        message = f"{name} is not supported{_BECAUSE.get(name, '')}{hint}"
        raise invalid(message, param=name, code="unsupported_parameter")


def has_no_effect(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value is None or any(_same(value, each) for each in neutral)


def _same(value: Any, neutral: Any) -> bool:
    """Compare as JSON does: true is not 1, while 0 is 0.0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _shown(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value).replace("'", '"')
