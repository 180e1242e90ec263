"""What a micro-batch asks of the stage that samples: from sequences to messages.

Tokens and masks of single sequences lie in shared memory, by their row of the block table: a message stays small
however long a context and however large a vocabulary is. A sequence is in one micro-batch at a time, so nobody reads a
row while it is written.
"""

from dataclasses import dataclass, field

import numpy as np

from engines.native import messages as m
from engines.native.scheduler import Batch, Entry
from engines.native.sequence import Sequence
from engines.native.shaping import Shaping
from engines.native.shared import SharedMemory
from engines.native.token_mask import mask_from


@dataclass(slots=True)
class Asks:
    """Of the rows of logits that are wanted, by their number; of ``scored``, by the entry of the micro-batch."""

    draws: list[m.Draw] = field(default_factory=list)
    shapes: list[m.Shape] = field(default_factory=list)
    tops: list[m.Top] = field(default_factory=list)
    scored: list[m.Scored] = field(default_factory=list)
    logprobs: bool = False


def asks_of(batch: Batch, sampled: list[int], shared: SharedMemory) -> Asks:
    """Return what is asked of ``batch``, of which the entries ``sampled`` want a token."""
    asks = Asks()
    for row, index in enumerate(sampled):
        sequence = batch.entries[index].sequence
        how = sequence.sampling
        if how.logprobs:
            asks.logprobs = True
        if how.top_logprobs:
            asks.tops.append(m.Top(row=row, count=how.top_logprobs))
        if how.temperature > 0.0:
            asks.draws.append(_draw(sequence, row))
        if sequence.shaping is not None and sequence.shaping.changes_logits:
            asks.shapes.append(_shape(sequence, sequence.shaping, row, shared))
    for index, entry in enumerate(batch.entries):
        if entry.sequence.scores is not None:
            scored = _scored(entry, index)
            if scored is not None:
                asks.scored.append(scored)
    return asks


def _draw(sequence: Sequence, row: int) -> m.Draw:
    how = sequence.sampling
    return m.Draw(
        row=row,
        temperature=how.temperature,
        top_p=how.top_p,
        top_k=how.top_k,
        seed=how.seed,
        position=sequence.num_output,
        min_p=0.0 if sequence.shaping is None else sequence.shaping.min_p,
    )


def _shape(sequence: Sequence, shaping: Shaping, row: int, shared: SharedMemory) -> m.Shape:
    tokens, is_counted = sequence.tokens, shaping.counts_tokens
    if is_counted:
        shared.tokens[sequence.row, sequence.mirrored : len(tokens)] = tokens[sequence.mirrored :]
        sequence.mirrored = len(tokens)
    if shaping.allowed is not None:
        mask_from(shaping.allowed, shared.masks[sequence.row])
    bans = bool(shaping.bad_words) or sequence.num_output < shaping.min_tokens
    forbidden = shaping.forbidden(tokens[sequence.num_prompt :], sequence.stop_ids) if bans else []
    return m.Shape(
        row=row,
        table_row=sequence.row,
        is_masked=shaping.allowed is not None,
        forbidden=np.array(forbidden, dtype=np.int32).tobytes(),
        bias_tokens=np.array(list(shaping.bias), dtype=np.int32).tobytes(),
        bias_values=np.array(list(shaping.bias.values()), dtype=np.float32).tobytes(),
        repetition=shaping.repetition,
        frequency=shaping.frequency,
        presence=shaping.presence,
        num_prompt=sequence.num_prompt,
        num_tokens=len(tokens) if is_counted else 0,
    )


def _scored(entry: Entry, index: int) -> m.Scored | None:
    """Ask for the prompt tokens that this entry predicts and that have no score yet; they may be computed again."""
    sequence = entry.sequence
    assert sequence.scores is not None
    first = max(entry.start, len(sequence.scores)) + 1
    end = min(entry.start + entry.count, sequence.num_prompt - 1) + 1
    if first >= end:
        return None
    return m.Scored(
        entry=index,
        skipped=first - 1 - entry.start,
        targets=np.array(sequence.tokens[first:end], dtype=np.int32).tobytes(),
        count=sequence.sampling.prompt_logprobs or 0,
    )
