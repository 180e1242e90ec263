"""The routed experts of a mixture, each with matrices of its own.

transformers merges all experts of a decoder into one tensor while it loads. Kept apart, each is mapped from its place
in the checkpoint's files, as all other weights are.
"""

from typing import Any

import torch
from torch import nn


class Expert(nn.Module):
    """A gated MLP."""

    def __init__(self, *, hidden_size: int, inner_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False, dtype=dtype)


class RoutedExperts(nn.ModuleList):
    """Stands where transformers' module of merged experts stood."""

    def __init__(self, experts: list[Expert], activation: Any) -> None:
        super().__init__(experts)
        self._activation = activation

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum (tokens, hidden) of the experts ``chosen`` (tokens, active) for each token.

        Experts are added in their order, whatever else is in the batch.
        """
        out = torch.zeros_like(hidden)
        for index in torch.unique(chosen).tolist():
            expert: Any = self[index]
            tokens, places = torch.where(chosen == index)
            states = hidden[tokens]
            states = expert.down_proj(self._activation(expert.gate_proj(states)) * expert.up_proj(states))
            out.index_add_(0, tokens, (states * weights[tokens, places, None]).to(out.dtype))
        return out


def keep_experts_apart(decoder: Any, *, dtype: torch.dtype) -> None:
    """Replace a decoder's merged experts, if it has any, by as many of their own; on the meta device."""
    merged = getattr(decoder.mlp, "experts", None)
    if merged is None:
        return
    with torch.device("meta"):
        experts = [
            Expert(hidden_size=merged.hidden_dim, inner_size=merged.intermediate_dim, dtype=dtype)
            for _ in range(merged.num_experts)
        ]
    decoder.mlp.experts = RoutedExperts(experts, merged.act_fn).eval().requires_grad_(requires_grad=False)
