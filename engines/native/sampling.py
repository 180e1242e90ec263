"""Choosing the next token. A draw depends on its seed and output position alone, never on what else is in the batch.

The noise comes from numpy's Philox, a counter-based generator (Salmon et al., SC 2011): key = seed, counter = position.
Tokens are drawn by the Gumbel-max rule, whose choice changes only where the two best candidates are equal to within the
rounding of the logits; walking down a cumulative sum would be much more sensitive to it.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch

from engines.native.messages import Draw


def sample(logits: torch.Tensor, draws: list[Draw], shaped: Mapping[int, torch.Tensor] = {}) -> torch.Tensor:
    """Return one token per row of ``logits`` (rows, vocabulary): greedy, except for the rows in ``draws``.

    Args:
        shaped: What stands for a row, by its number.
    """
    tokens = logits.argmax(dim=-1)
    for row, own in shaped.items():
        tokens[row] = own.argmax()
    for draw in draws:
        tokens[draw.row] = _draw(shaped.get(draw.row, logits[draw.row]), draw)
    return tokens


def chosen_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each chosen token under the unmodified distribution."""
    chosen = logits.gather(1, tokens.view(-1, 1)).view(-1)
    return chosen - logits.logsumexp(dim=-1)


def _draw(row: torch.Tensor, draw: Draw) -> torch.Tensor:
    row = row.double()
    scaled = (row - row.max()) / draw.temperature  # the likeliest is 0, else the least temperatures made many infinite
    if draw.min_p > 0.0:  # of the likeliest token's probability
        scaled = scaled.masked_fill(scaled < math.log(draw.min_p), -torch.inf)
    kept = keep_mask(scaled, top_k=draw.top_k, top_p=draw.top_p)
    noise = gumbel_noise(seed=draw.seed, position=draw.position, size=len(row))
    return (scaled + torch.from_numpy(noise)).masked_fill(~kept, -torch.inf).argmax()


def gumbel_noise(*, seed: int, position: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return standard Gumbel noise, one value per vocabulary entry."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))
    return -np.log(generator.standard_exponential(size))


def keep_mask(scaled: torch.Tensor, *, top_k: int, top_p: float) -> torch.Tensor:
    """Return which tokens may be drawn: the ``top_k`` most likely, of these the smallest set of mass ``top_p``.

    Equal logits are kept or dropped together, so the result does not depend on the order of a sort.
    """
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if 0 < top_k < len(scaled):
        kept = scaled >= scaled.topk(top_k).values[-1]
    if top_p < 1.0:
        ordered = scaled.masked_fill(~kept, -torch.inf).sort(descending=True).values
        mass = ordered.softmax(dim=-1)
        needed = int(((mass.cumsum(dim=-1) - mass) < top_p).sum())
        kept &= scaled >= ordered[max(needed, 1) - 1]
    return kept
