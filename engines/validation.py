"""What every engine checks before it takes a request or a layout."""

from engines.errors import InvalidRequest
from engines.protocol import EngineCapabilities, GenerationRequest, SamplingParams
from planner.layout import Pipeline


def check_request(request: GenerationRequest, capabilities: EngineCapabilities) -> None:
    """Return when ``request`` can be run.

    Raises:
        InvalidRequest: Names the parameter at fault, with the numbers.
    """
    prompt, sampling = request.prompt_token_ids, request.sampling
    if not capabilities.generates:
        raise InvalidRequest(f"the {capabilities.name} engine generates nothing with this model", parameter="model")
    if not prompt:
        raise InvalidRequest("the prompt has no tokens", parameter="prompt")
    if len(prompt) >= capabilities.max_model_len:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens, the context {capabilities.max_model_len}", parameter="prompt"
        )
    known = len(prompt) + len(request.generated_token_ids)
    if known >= capabilities.max_model_len:
        raise InvalidRequest(
            f"prompt and output so far have {known} tokens, the context {capabilities.max_model_len}",
            parameter="generated_token_ids",
        )
    for token_ids in (prompt, request.generated_token_ids):
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < capabilities.vocab_size):
            raise InvalidRequest(
                f"token ids must lie in 0 to {capabilities.vocab_size - 1}, these reach from {min(token_ids)} "
                f"to {max(token_ids)}",
                parameter="prompt",
            )
    name = unknown_parameter(sampling, capabilities)
    if name is not None:
        raise InvalidRequest(f"the {capabilities.name} engine has no parameter {name}", parameter=name)
    if sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, not {sampling.max_tokens}", parameter="max_tokens")


def unknown_parameter(sampling: SamplingParams, capabilities: EngineCapabilities) -> str | None:
    """Name the first parameter of ``sampling`` that this kind of engine does not have; None: it has them all."""
    if sampling.prompt_logprobs is not None and not capabilities.top_logprobs:
        return "prompt_logprobs"
    if sampling.top_logprobs and not capabilities.top_logprobs:
        return "top_logprobs"
    if sampling.adapter and sampling.adapter not in capabilities.adapters:
        return "model"
    if sampling.grammar is not None and not capabilities.grammars:
        return sampling.grammar.parameter
    return next((name for name in sampling.engine_params if name not in capabilities.engine_params), None)


def refusal_of(target: Pipeline, *, current: Pipeline, capabilities: EngineCapabilities) -> str | None:
    """Say why ``target`` could not be run, None when it could. Memory is another question."""
    if target.num_decoders != current.num_decoders:
        return f"the model has {current.num_decoders} decoders, the layout {target.num_decoders}"
    if target.granularity > capabilities.max_stages:
        return f"at most {capabilities.max_stages} stages, {target.granularity} asked"
    if not capabilities.tensor_parallel and any(len(stage.device_ids) > 1 for stage in target.stages):
        return "this engine runs one device per stage"
    if target == current:
        return "this layout is in force already"
    return None
