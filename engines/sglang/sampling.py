"""A request of ours in SGLang's words. Pure.

The plugin inside SGLang draws by seed and position, so a request that goes on after tokens were produced elsewhere is
one with a longer prompt, and goes on as it would have. It is told how much of that prompt penalties count as output.
"""

from typing import Any, Final

from engines.errors import InvalidRequest
from engines.protocol import GenerationRequest

_SEEDS: Final = 1 << 63  # SGLang takes a signed number
# What SGLang knows of what clients may ask for, by the name that the daemon's API has for it.
_NAMES: Final = {
    "min_p": "min_p",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "repetition_penalty": "repetition_penalty",
    "logit_bias": "logit_bias",
    "min_tokens": "min_new_tokens",
}
ENGINE_PARAMS: Final = frozenset(_NAMES)
_PENALTIES: Final = frozenset({"frequency_penalty", "presence_penalty", "repetition_penalty"})
_REPLAYED: Final = "flexpiped_replayed"  # as the plugin reads it


def to_sglang(request: GenerationRequest, *, max_tokens: int) -> dict[str, Any]:
    """Return SGLang's ``sampling_params``.

    Raises:
        InvalidRequest: SGLang has no such parameter.
    """
    ours = request.sampling
    wire: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "temperature": ours.temperature,
        "top_p": ours.top_p,
        "top_k": ours.top_k or -1,
        "sampling_seed": ours.seed % _SEEDS,
        # With ignore_eos it would not look at these either: the stream is then cut here.
        "stop_token_ids": list(ours.stop_token_ids),
        "ignore_eos": ours.ignore_eos,
        "no_stop_trim": True,
        "skip_special_tokens": False,
    }
    for name, value in ours.engine_params.items():
        if name not in _NAMES:
            raise InvalidRequest(f"SGLang has no parameter {name}", parameter=name)
        wire[_NAMES[name]] = value
    if "min_new_tokens" in wire:
        wire["min_new_tokens"] = max(0, wire["min_new_tokens"] - len(request.generated_token_ids))
    if request.generated_token_ids and wire.keys() & _PENALTIES:
        wire["custom_params"] = {_REPLAYED: len(request.generated_token_ids)}
    return wire


def parameter_of(message: str) -> str:
    """Return the parameter that SGLang finds fault with, by its words: ``top_p must be in (0, 1]``."""
    word = message.split(" ", 1)[0]
    return next((ours for ours, theirs in _NAMES.items() if theirs == word), word if word in _PLAIN else "prompt")


_PLAIN: Final = frozenset({"temperature", "top_p", "top_k", "max_new_tokens", "sampling_seed"})
