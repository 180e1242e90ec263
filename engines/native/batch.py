"""What a micro-batch is made of, and what its step brings each sequence."""

from dataclasses import dataclass

from engines.native.sequence import Sequence
from engines.protocol import FinishReason, ScoredToken, TopLogprobs


@dataclass(frozen=True, slots=True)
class Entry:
    """``count`` tokens of a sequence from position ``start``; with ``samples`` the next token is wanted."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch."""

    step_id: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """What one step brought one sequence."""

    key: int
    token: int | None
    logprob: float | None
    finish: FinishReason | None
    top: TopLogprobs = ()
    prompt: tuple[ScoredToken, ...] = ()
    cached: int | None = None  # of the prompt's tokens; with the first output token only
