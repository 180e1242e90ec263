"""What a step brought besides tokens, out of the messages of the stage that samples."""

from dataclasses import dataclass

import numpy as np

from engines.native import messages as m
from engines.protocol import ScoredToken, TopLogprobs


@dataclass(frozen=True, slots=True)
class Details:
    """Log-probabilities beyond those of chosen tokens: by row of the logits, and by entry of the micro-batch."""

    tops: dict[int, TopLogprobs]
    scores: dict[int, list[ScoredToken]]


def details_of(done: m.StepDone) -> Details | None:
    """Return what a step brought besides tokens, None for nothing, as nearly always."""
    if not done.tops and not done.scores:
        return None
    return Details(
        tops={top.row: _pairs(top.tokens, top.logprobs) for top in done.tops},
        scores={score.entry: _scores(score) for score in done.scores},
    )


def _pairs(tokens: bytes, logprobs: bytes) -> TopLogprobs:
    ids, values = np.frombuffer(tokens, dtype=np.int32), np.frombuffer(logprobs, dtype=np.float32)
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _scores(score: m.Score) -> list[ScoredToken]:
    targets = np.frombuffer(score.targets, dtype=np.int32).tolist()
    logprobs = np.frombuffer(score.logprobs, dtype=np.float32).tolist()
    ranks = np.frombuffer(score.ranks, dtype=np.int32).tolist()
    tops = _pairs(score.top_tokens, score.top_logprobs)
    each = len(tops) // len(targets)
    return [
        ScoredToken(token_id=token, logprob=logprob, rank=rank, top=tops[i * each : (i + 1) * each])
        for i, (token, logprob, rank) in enumerate(zip(targets, logprobs, ranks, strict=True))
    ]
