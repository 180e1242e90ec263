"""Sampling by the seed of each request.

SGLang has it: a draw that depends on seed and position only. But only its "deterministic inference" uses it, which
allows a few attention backends, none of them for the CPU, and turns the prefix cache off for some. A draw needs
neither: with the seed set, a request goes on after a replay as it would have.
"""

from functools import wraps
from typing import Any

import torch


def draw_by_seed() -> None:
    """Set the seed of every request, and allow min_p beside it."""
    from sglang.srt.layers import sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    describe = SamplingBatchInfo.from_schedule_batch.__func__  # type: ignore[attr-defined]  # a class method

    @wraps(describe)
    def from_schedule_batch(cls: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        info = describe(cls, batch, *args, **kwargs)
        if info.sampling_seed is None:
            seeds = [request.sampling_params.sampling_seed or 0 for request in batch.reqs]
            info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device, non_blocking=True)
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)
    sampler.top_k_top_p_min_p_sampling_from_probs_torch = _with_min_p(
        sampler.top_k_top_p_min_p_sampling_from_probs_torch
    )


def _with_min_p(sample: Any) -> Any:
    """Return ``sample`` that takes min_p beside a seed.

    SGLang refuses that because the weights that are left do not add up to one. A seeded draw adds noise to their
    logarithms, which a common factor does not change; what is too unlikely only has to go before.
    """

    @wraps(sample)
    def wrapped(
        probs: torch.Tensor,
        top_ks: torch.Tensor,
        top_ps: torch.Tensor,
        min_ps: torch.Tensor,
        need_min_p_sampling: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if need_min_p_sampling:
            unlikely = probs < probs.amax(dim=-1, keepdim=True) * min_ps.view(-1, 1)
            probs = probs.masked_fill(unlikely, 0.0)
        return sample(probs, top_ks, top_ps, min_ps, False, *args, **kwargs)

    return wrapped
