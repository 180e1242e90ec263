"""What a micro-batch asks of the stage that samples: from sequences to messages.

Tokens and masks of single sequences lie in shared memory, by their row of the block table: a message stays small
however long a context and however large a vocabulary is. A sequence is in one micro-batch at a time, so nobody reads a
row while it is written.
"""

from dataclasses import dataclass, field

import numpy as np

from engines.native import messages as m
from engines.native.batch import Batch, Entry
from engines.native.sequence import Sequence
from engines.native.shaping import Shaping
from engines.native.shared import SharedMemory
from engines.native.token_mask import allow_all, allow_only, forbid

_NOTHING = Shaping()


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
        shaping = sequence.shaping
        if sequence.matcher is not None or (shaping is not None and shaping.changes_logits):
            asks.shapes.append(_shape(sequence, shaping or _NOTHING, row, shared))
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
    if shaping.bias and not sequence.mirrored:
        own = shared.biases[sequence.row]
        own[:] = 0.0
        own[list(shaping.bias)] = list(shaping.bias.values())
    if is_counted:
        shared.tokens[sequence.row, sequence.mirrored : len(tokens)] = tokens[sequence.mirrored :]
    sequence.mirrored = len(tokens)
    return m.Shape(
        row=row,
        table_row=sequence.row,
        is_masked=_fill_mask(sequence, shaping, shared),
        is_biased=bool(shaping.bias),
        repetition=shaping.repetition,
        frequency=shaping.frequency,
        presence=shaping.presence,
        num_prompt=sequence.num_prompt,
        num_tokens=len(tokens) if is_counted else 0,
    )


def _fill_mask(sequence: Sequence, shaping: Shaping, shared: SharedMemory) -> bool:
    """Say which tokens may be chosen; False: all of them. What is forbidden besides counts if it leaves any."""
    bans = bool(shaping.bad_words) or sequence.num_output < shaping.min_tokens
    forbidden = shaping.forbidden(sequence.tokens[sequence.num_prompt :], sequence.held_ids) if bans else []
    if not forbidden and shaping.allowed is None and sequence.matcher is None:
        return False
    words = shared.masks[sequence.row]
    if shaping.allowed is None:
        allow_all(words, shared.sizes.vocab_size)
    else:
        allow_only(words, shaping.allowed)
    if sequence.matcher is not None:
        allowed = words.copy()
        sequence.matcher.fill(words)
        words &= allowed
    if forbidden:
        forbid(words, forbidden)
    return True


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
