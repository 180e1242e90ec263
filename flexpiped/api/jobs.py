"""A request that has been checked, as the choices that it wants. Pure."""

from collections.abc import Iterator
from dataclasses import replace

from engines.protocol import GenerationRequest
from flexpiped.api.generation import Job, ReadsCalls
from flexpiped.api.parameters import MAX_SEED, Parameters


def jobs_of(
    parameters: Parameters,
    request: GenerationRequest,
    *,
    ends: frozenset[int],
    lead: str,
    first: int = 0,
    reads: ReadsCalls | None = None,
) -> list[Job]:
    """Return one job for each choice: seeds and names of the others follow those of the first, which is ``first``.

    Args:
        ends: The tokens with which the model ends it by itself.
    """
    choices, min_tokens = parameters.choices, parameters.engine_params.get("min_tokens", 0)
    return [
        Job(
            request=each,
            stop=parameters.stop,
            include_stop=parameters.include_stop,
            ends=ends,
            index=first + index,
            min_tokens=min_tokens,
            lead=lead,
            tells_tokens=choices.logprobs is not None,
            prompt_top=choices.prompt_logprobs,
            tells_cached=index == 0,  # the others begin with what the first one computes
            leads_tokens=choices.echo and choices.logprobs is not None,
            is_prompt_only=parameters.max_tokens == 0,
            reads=reads,
        )
        for index, each in enumerate(_requests(request, choices.best_of))
    ]


def _requests(first: GenerationRequest, count: int) -> Iterator[GenerationRequest]:
    yield first
    for index in range(1, count):
        sampling = replace(first.sampling, seed=(first.sampling.seed + index) & MAX_SEED)
        yield replace(first, request_id=f"{first.request_id}-{index}", sampling=sampling)
