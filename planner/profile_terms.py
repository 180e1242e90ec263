"""What a stage's time is spent on, and how much of each a step needs: few terms that people can read.

A stage's time is the sum of its layers' and its own. Each is linear in what the step computes:

    stage      a step (message, positions) + tokens (activations in and out)
    embedding  tokens
    decoder    a call (launches, weights read once) + tokens, each span of them at a price of its own: a product of
               matrices is bound by reading weights at first and by arithmetic later, and kernels change with its rows
               + context read, which costs a token that decodes alone more + pairs attended to
    head       a call (weights of the LM head) + more than one row + rows of logits
"""

from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Final

from planner.layer_costs import Batch
from planner.model_graph import LayerKind


class Term(Enum):
    """What time is spent on; the value is its name in files and for people."""

    STAGE_STEP = "stage, each step"
    STAGE_TOKEN = "stage, each token"
    EMBEDDING_TOKEN = "embedding, each token"
    DECODER_CALL = "decoder, each call"
    DECODER_TOKEN_TO_2 = "decoder, each token beyond 1"
    DECODER_TOKEN_TO_4 = "decoder, each token beyond 2"
    DECODER_TOKEN_TO_8 = "decoder, each token beyond 4"
    DECODER_TOKEN_TO_16 = "decoder, each token beyond 8"
    DECODER_TOKEN_TO_32 = "decoder, each token beyond 16"
    DECODER_TOKEN_TO_64 = "decoder, each token beyond 32"
    DECODER_TOKEN_TO_128 = "decoder, each token beyond 64"
    DECODER_TOKEN_FROM_128 = "decoder, each token beyond 128"
    DECODER_CONTEXT = "decoder, each token of context read"
    DECODER_CONTEXT_ALONE = "decoder, more of it for one alone"
    DECODER_PAIR = "decoder, each pair attended"
    HEAD_CALL = "head, each call"
    HEAD_SEVERAL = "head, more than one row"
    HEAD_ROW = "head, each row of logits"


# The spans of tokens: beyond which and up to how many. A price is that of each token within the span.
TOKEN_SPANS: Final[tuple[tuple[Term, int, float], ...]] = (
    (Term.DECODER_TOKEN_TO_2, 1, 2),
    (Term.DECODER_TOKEN_TO_4, 2, 4),
    (Term.DECODER_TOKEN_TO_8, 4, 8),
    (Term.DECODER_TOKEN_TO_16, 8, 16),
    (Term.DECODER_TOKEN_TO_32, 16, 32),
    (Term.DECODER_TOKEN_TO_64, 32, 64),
    (Term.DECODER_TOKEN_TO_128, 64, 128),
    (Term.DECODER_TOKEN_FROM_128, 128, inf),
)


def stage_amounts(batch: Batch) -> dict[Term, float]:
    """Return how much of each term a stage needs beside its layers."""
    return {Term.STAGE_STEP: 1.0, Term.STAGE_TOKEN: float(batch.tokens)}


def layer_amounts(kind: LayerKind, batch: Batch, *, window_tokens: int | None = None) -> dict[Term, float]:
    """Return how much of each term one layer needs."""
    match kind:
        case LayerKind.EMBEDDING:
            return {Term.EMBEDDING_TOKEN: float(batch.tokens)}
        case LayerKind.HEAD:
            rows = batch.sequences
            return {Term.HEAD_CALL: 1.0, Term.HEAD_SEVERAL: float(rows > 1), Term.HEAD_ROW: float(rows)}
        case LayerKind.DECODER:
            cached = batch.cached(window_tokens)
            return _token_amounts(batch.tokens) | {
                Term.DECODER_CALL: 1.0,
                Term.DECODER_CONTEXT: cached,
                Term.DECODER_CONTEXT_ALONE: cached if batch.tokens == 1 else 0.0,
                Term.DECODER_PAIR: batch.attended(window_tokens),
            }


def _token_amounts(tokens: int) -> dict[Term, float]:
    return {term: float(max(0, min(tokens, last) - beyond)) for term, beyond, last in TOKEN_SPANS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One stage, one batch: the mean time of its steps. ``beside_others``: other stages computed meanwhile."""

    threads: int
    beside_others: bool
    num_decoders: int
    has_embedding: bool
    has_head: bool
    batch: Batch
    busy_s: float

    def amounts(self) -> dict[Term, float]:
        """Return how much of each term the stage's step needed."""
        found = stage_amounts(self.batch)
        if self.has_embedding:
            found |= layer_amounts(LayerKind.EMBEDDING, self.batch)
        found |= {
            term: self.num_decoders * amount for term, amount in layer_amounts(LayerKind.DECODER, self.batch).items()
        }
        return found | (layer_amounts(LayerKind.HEAD, self.batch) if self.has_head else {})
