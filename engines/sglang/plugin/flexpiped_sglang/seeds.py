"""Sampling by the seed of each request.

SGLang has it: a draw that depends on seed and position only. But only its "deterministic inference" uses it, which
allows a few attention backends, none of them for the CPU, and turns the prefix cache off for some. A draw needs
neither: with the seed set, a request goes on after a replay as it would have.
"""

import zlib
from functools import wraps
from typing import Any

import torch
from flexpiped_served.signatures import parameters_of

from flexpiped_sglang.optional import expect

_SAMPLER_TAKES = ["probs", "top_ks", "top_ps", "min_ps", "need_min_p_sampling", "sampling_seed", "positions"]


def draw_by_seed() -> None:
    """Set the seed of every request, and have its draws depend on nothing else than that and its position.

    Raises:
        ImportError, AttributeError: Nothing is changed: this SGLang samples in a way that is not understood.
    """
    from sglang.srt.layers import sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    describe = SamplingBatchInfo.from_schedule_batch.__func__  # type: ignore[attr-defined]  # a class method
    sample, draw = sampler.top_k_top_p_min_p_sampling_from_probs_torch, sampler.multinomial_with_seed
    expect(parameters_of(sample)[:7] == _SAMPLER_TAKES, "the sampler takes other arguments")
    expect(hasattr(SamplingBatchInfo, "sampling_seed"), "batches have no seeds")

    @wraps(describe)
    def from_schedule_batch(cls: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        info = describe(cls, batch, *args, **kwargs)
        if info.sampling_seed is None:
            seeds = [seed_of(request.sampling_params.sampling_seed, request_id=request.rid) for request in batch.reqs]
            info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device, non_blocking=True)
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)
    sampler.top_k_top_p_min_p_sampling_from_probs_torch = _by_token(sample, draw)


def seed_of(given: int | None, *, request_id: str) -> int:
    """Return the seed of a request: where none is given, one of its own that is the same on every rank."""
    return zlib.crc32(request_id.encode()) if given is None else given


def _by_token(sample: Any, draw: Any) -> Any:
    """Return ``sample`` whose seeded draws depend on nothing but a request's own seed, position and probabilities.

    SGLang's draws among the tokens in the order of their probability where one request of the batch needs it, else in
    the order of their ids: the same request would get other tokens beside other requests. It also refuses min_p beside
    a seed, because the weights that are left do not add up to one, which a draw by noise on logarithms does not need.
    """

    @wraps(sample)
    def wrapped(
        probs: torch.Tensor,
        top_ks: torch.Tensor,
        top_ps: torch.Tensor,
        min_ps: torch.Tensor,
        need_min_p_sampling: bool,
        sampling_seed: torch.Tensor | None,
        positions: torch.Tensor,
        *,
        return_filtered_probs: bool = False,
        **kwargs: Any,
    ) -> Any:
        if sampling_seed is None or return_filtered_probs:
            kwargs["return_filtered_probs"] = return_filtered_probs
            return sample(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions, **kwargs)
        kept = filtered(probs, top_ks, top_ps, min_ps if need_min_p_sampling else None)
        return draw(torch.log(kept), sampling_seed, positions).view(-1).to(torch.int32)

    return wrapped


def filtered(
    probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor | None
) -> torch.Tensor:
    """Return probabilities of shape ``(requests, vocabulary)`` with what is not to be drawn at zero."""
    sorted_probs, token_ids = probs.sort(dim=-1, descending=True)
    before = sorted_probs.cumsum(dim=-1) - sorted_probs
    ranks = torch.arange(probs.shape[-1], device=probs.device).view(1, -1)
    dropped = (ranks >= top_ks.view(-1, 1)) | (before > top_ps.view(-1, 1))
    if min_ps is not None:
        dropped |= sorted_probs < sorted_probs[:, :1] * min_ps.view(-1, 1)
    return torch.zeros_like(probs).scatter(1, token_ids, sorted_probs.masked_fill(dropped, 0.0))
