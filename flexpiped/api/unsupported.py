"""Parameters of OpenAI's API (or vLLM's) that are not honoured here: accepted only where they change nothing.

Some of them an engine may honour: those of ``engine_parameters``, and those that its own server knows (``routing``).
"""

from collections.abc import Mapping
from typing import Any

from flexpiped.api.errors import invalid
from flexpiped.api.fields import Body

NeutralValues = Mapping[str, tuple[Any, ...]]  # besides null, which is always neutral

_BOTH: NeutralValues = {
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "frequency_penalty": (0,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
COMPLETION_NEUTRAL: NeutralValues = {
    **_BOTH,
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "suffix": (),
}
CHAT_NEUTRAL: NeutralValues = {
    **_BOTH,
    "add_generation_prompt": (True,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def refuse_unsupported(body: Body, neutral: NeutralValues) -> None:
    """Return when every parameter of ``neutral`` is absent or has no effect.

    Raises:
        ApiError: 400, naming the parameter.
    """
    for name, values in neutral.items():
        if has_no_effect(body.get(name), values):
            continue
        hint = "; leave it out" if not values else f"; leave it out or give {_shown(values[0])}"
        raise invalid(f"{name} is not supported{hint}", param=name, code="unsupported_parameter")


def has_no_effect(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value is None or any(_same(value, each) for each in neutral)


def _same(value: Any, neutral: Any) -> bool:
    """Compare as JSON does: true is not 1, while 0 is 0.0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _shown(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value).replace("'", '"')
