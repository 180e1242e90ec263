"""Penalties that count all output of a request: what another engine produced, and what was there before a retraction.

SGLang counts output tokens from where a prompt has been computed, and the prompt of a request that goes on holds those
that came before.
"""

import inspect
from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch

from flexpiped_sglang.optional import expect

REPLAYED = "flexpiped_replayed"  # of a request's ``custom_params``: so many tokens at the end of its prompt are output
# What a penalizer has for each request and token, and what one token adds to it, or sets it to.
_ADDED = {"cumulated_frequency_penalties": "frequency_penalties"}
_SET = {
    "cumulated_presence_penalties": "presence_penalties",
    "cumulated_repetition_penalties": "repetition_penalties",
}
_LENGTH = "len_output_tokens"  # until which the end is held back


def go_on_counting() -> None:
    """Have every batch of prompts begin with the output that its requests have. Raises: AttributeError, ImportError."""
    from sglang.srt.sampling import penaltylib
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    kinds = (
        penaltylib.BatchedFrequencyPenalizer,
        penaltylib.BatchedPresencePenalizer,
        penaltylib.BatchedRepetitionPenalizer,
        penaltylib.BatchedMinNewTokensPenalizer,
    )
    sources = "".join(inspect.getsource(kind) for kind in kinds)
    for name in (*_ADDED, *_ADDED.values(), *_SET, *_SET.values(), _LENGTH):
        expect(f"self.{name} = " in sources, f"no penalizer has {name}")
    describe = SamplingBatchInfo.from_schedule_batch.__func__  # type: ignore[attr-defined]  # a class method

    @wraps(describe)
    def from_schedule_batch(cls: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        info = describe(cls, batch, *args, **kwargs)
        if info.penalizer_orchestrator.is_required:
            for penalizer in info.penalizer_orchestrator.penalizers.values():
                if penalizer.is_prepared():
                    count(penalizer, batch.reqs)
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)


def count(penalizer: Any, requests: Sequence[Any]) -> None:
    """Have a penalizer that is new count the output of each of its requests."""
    for row, request in enumerate(requests):
        if hasattr(penalizer, _LENGTH):
            # what was replayed is taken off the tokens that are asked for
            getattr(penalizer, _LENGTH)[row] += len(request.output_ids)
        elif output := output_of(request):
            _count_in_row(penalizer, row, output)


def output_of(request: Any) -> list[int]:
    """Return the output of a request that is computed as part of its prompt now."""
    custom = request.sampling_params.custom_params
    replayed = custom.get(REPLAYED) if isinstance(custom, dict) else None
    if not isinstance(replayed, int) or replayed < 1:  # clients may give parameters of that name, too
        return list(request.output_ids)
    return [*request.origin_input_ids[-replayed:], *request.output_ids]


def _count_in_row(penalizer: Any, row: int, output: list[int]) -> None:
    for names, are_added in ((_ADDED, True), (_SET, False)):
        for name, of_one in names.items():
            if hasattr(penalizer, name):
                counted, one = getattr(penalizer, name)[row], getattr(penalizer, of_one)[row]
                tokens = torch.tensor(output, dtype=torch.int64, device=counted.device)
                if are_added:
                    counted.index_add_(0, tokens, one.expand(len(output)))
                else:
                    counted[tokens] = one
