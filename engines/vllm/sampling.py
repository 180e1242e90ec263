"""A request of ours in vLLM's words. Pure.

vLLM carries no state of a sampler, so a request that goes on after tokens were produced elsewhere is one with a longer
prompt: greedy output goes on exactly; a seeded draw goes on, but not as it would have, and penalties of output tokens
begin anew.
"""

from typing import Any, Final

from engines.errors import InvalidRequest
from engines.protocol import GenerationRequest

_SEEDS: Final = 1 << 63  # vLLM takes a signed number and reads -1 as "none"
ENGINE_PARAMS: Final = frozenset(
    {"allowed_token_ids", "bad_words", "frequency_penalty", "logit_bias", "min_p", "min_tokens"}
    | {"presence_penalty", "repetition_penalty"}
)
# What the daemon decides of each request; anything else that vLLM knows may be passed.
_OURS: Final = frozenset(
    {"n", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop_token_ids", "ignore_eos", "logprobs"}
    | {"stop", "detokenize", "output_kind", "stream_interval", "prompt_logprobs", "flat_logprobs", "skip_clone"}
)


def to_vllm(request: GenerationRequest, *, max_tokens: int) -> dict[str, Any]:
    """Return the fields of vLLM's ``SamplingParams``.

    Raises:
        InvalidRequest: A parameter of the engine's is one that the daemon sets.
    """
    ours, done = request.sampling, len(request.generated_token_ids)
    wire: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": ours.temperature,
        "top_p": ours.top_p,
        "top_k": ours.top_k,
        "seed": ours.seed % _SEEDS if ours.temperature > 0 else None,
        "stop_token_ids": list(ours.stop_token_ids),
        "ignore_eos": ours.ignore_eos,
        "logprobs": 0 if ours.logprobs else None,  # 0: of the chosen token only
    }
    for name, value in ours.engine_params.items():
        if name in _OURS:
            raise InvalidRequest(f"{name} is not a parameter to pass to the engine as it is", parameter=name)
        wire[name] = value
    if request.kv is not None and request.kv.loan is None:
        extra = wire.get("extra_args") or {}
        wire["extra_args"] = {**extra, "kv_transfer_params": {"flexpiped": str(request.kv.directory)}}
    if "min_tokens" in ours.engine_params:
        wire["min_tokens"] = max(0, ours.engine_params["min_tokens"] - done)
    return wire
