"""Log-probabilities beyond those of chosen tokens: the likeliest of a row, and those of a prompt.

All are of the model's own distribution, whatever temperature or penalties a request has.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from engines.native.messages import Score, Scored, Top, Tops

_ROWS: Final = 64  # of logits at a time, so that a long prompt needs no more memory than a batch


def tops_of(row: torch.Tensor, asked: Top) -> Tops:
    """Return the likeliest tokens of a row of logits (vocabulary)."""
    values, tokens = row.topk(min(asked.count, len(row)))
    return Tops(row=asked.row, tokens=_ints(tokens), logprobs=_floats(values - row.logsumexp(dim=-1)))


def score(head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, asked: Scored) -> Score:
    """Return how likely each target was, after the state of ``hidden`` (tokens, hidden) at its place."""
    targets = torch.from_numpy(np.frombuffer(asked.targets, dtype=np.int32).astype(np.int64))
    parts = [
        _score(head(hidden[i : i + _ROWS][: len(targets) - i]), targets[i : i + _ROWS], asked.count)
        for i in range(0, len(targets), _ROWS)
    ]
    logprobs, ranks, top_tokens, top_logprobs = (b"".join(each) for each in zip(*parts, strict=True))
    return Score(
        entry=asked.entry,
        targets=asked.targets,
        logprobs=logprobs,
        ranks=ranks,
        top_tokens=top_tokens,
        top_logprobs=top_logprobs,
    )


def _score(logits: torch.Tensor, targets: torch.Tensor, count: int) -> tuple[bytes, bytes, bytes, bytes]:
    there = logits.gather(1, targets.view(-1, 1))
    mass = logits.logsumexp(dim=-1, keepdim=True)
    ranks = (logits >= there).sum(dim=-1)  # behind those that are as likely, as in vLLM
    values, tokens = logits.topk(min(count, logits.shape[1])) if count else (logits[:, :0], targets[:0])
    return _floats(there - mass), _ints(ranks), _ints(tokens), _floats(values - mass)


def _ints(values: torch.Tensor) -> bytes:
    return values.int().numpy().tobytes()


def _floats(values: torch.Tensor) -> bytes:
    return values.float().numpy().tobytes()
