"""One row of logits as a request wants it changed, in the order in which vLLM 0.32 does so.

1. Tokens outside the mask cannot be chosen: ``allowed_token_ids``, a grammar, bad words, ``min_tokens``.
2. ``logit_bias`` is added.
3. Of the tokens of prompt and output, positive logits are divided by the repetition penalty, others multiplied by it;
   output tokens lose the frequency penalty for each time they came, and the presence penalty once.

Sources: Keskar et al., CTRL, 2019, section 4.1 (repetition); OpenAI's API reference (frequency, presence).
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from engines.native.messages import Shape
from engines.native.shared import SharedMemory
from engines.native.token_mask import is_set

Ints = npt.NDArray[np.int32]
_MOST: Final = torch.finfo(torch.float32).max  # of a logit: with infinity there are no probabilities


def shaped(row: torch.Tensor, shape: Shape, shared: SharedMemory) -> torch.Tensor:
    """Return a changed copy of ``row`` (vocabulary), in float32."""
    own = row.to(torch.float32, copy=True)
    if shape.is_masked:
        own[torch.from_numpy(~is_set(shared.masks[shape.table_row], len(own)))] = -torch.inf
    if shape.is_biased:
        own += torch.from_numpy(shared.biases[shape.table_row, : len(own)])
    if shape.num_tokens:
        tokens = shared.tokens[shape.table_row, : shape.num_tokens]
        _penalise(own, shape, prompt=tokens[: shape.num_prompt], output=tokens[shape.num_prompt :])
    return own


def _penalise(own: torch.Tensor, shape: Shape, *, prompt: Ints, output: Ints) -> None:
    if shape.repetition != 1.0:
        seen = _ids(np.unique(np.concatenate((prompt, output))))
        there = own[seen].double()  # in float32 the least penalties are 0, and what cannot be chosen became NaN
        there = torch.where(there > 0, there / shape.repetition, there * shape.repetition)
        own[seen] = there.clamp(max=_MOST).float()
    if len(output) and (shape.frequency or shape.presence):
        tokens, counts = np.unique(output, return_counts=True)
        own[_ids(tokens)] -= torch.from_numpy(counts).float() * shape.frequency + shape.presence


def _ids(tokens: Ints) -> torch.Tensor:
    return torch.from_numpy(tokens.astype(np.int64))
