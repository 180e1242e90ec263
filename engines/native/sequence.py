"""One request as the scheduler sees it."""

from enum import Enum
from typing import TYPE_CHECKING

from engines.native.kv_prefixes import block_name
from engines.native.shaping import Shaping
from engines.protocol import FinishReason, SamplingParams, ScoredToken

if TYPE_CHECKING:
    from engines.native.grammar import Matcher


class SequenceState(Enum):
    WAITING = "waiting"  # holds no KV blocks
    RUNNING = "running"  # holds KV blocks and a row of the block table
    FINISHED = "finished"


class Sequence:
    """Tokens known so far and how many of them are in the KV cache.

    Prompt and output are one list: a preempted or recovered sequence is simply one with nothing computed.
    ``cached`` is how many of its tokens were in the KV cache when it was first let in; None before that.
    """

    __slots__ = (
        "aborted",
        "adapter",
        "block_ids",
        "block_names",
        "cached",
        "computed",
        "has_told_cached",
        "held_ids",
        "in_flight",
        "key",
        "last_step",
        "matcher",
        "mirrored",
        "num_prompt",
        "order",
        "row",
        "sampling",
        "scores",
        "shaping",
        "state",
        "stop_ids",
        "tokens",
    )

    def __init__(
        self,
        *,
        key: int,
        prompt: list[int],
        generated: list[int],
        sampling: SamplingParams,
        stop_ids: frozenset[int],
        order: int,
        held_ids: frozenset[int] | None = None,
        shaping: Shaping | None = None,
        matcher: "Matcher | None" = None,
        adapter: int = 0,
    ) -> None:
        self.key = key
        self.tokens = prompt + generated
        self.num_prompt = len(prompt)
        self.sampling = sampling
        self.stop_ids = stop_ids
        self.held_ids = stop_ids if held_ids is None else held_ids  # what is not chosen before ``min_tokens``
        self.order = order  # of arrival: the oldest is preempted last
        self.computed = 0
        self.block_ids: list[int] = []
        self.block_names: list[bytes] = []  # of the full KV blocks of its tokens, as far as they were asked for
        self.cached: int | None = None
        self.has_told_cached = False
        self.row = -1
        self.shaping = shaping
        self.adapter = adapter  # its number; 0: none
        self.matcher = matcher  # has taken in all output tokens
        self.mirrored = 0  # tokens that lie in shared memory, too, at its row
        # Of the prompt's tokens but the first, as far as they are known; None: not asked for, or reported before.
        self.scores: list[ScoredToken] | None = None if sampling.prompt_logprobs is None or generated else []
        self.in_flight = False
        self.last_step = 0  # in which it was last scheduled
        self.aborted = False
        self.state = SequenceState.WAITING

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def pending(self) -> int:
        """Tokens known but not in the KV cache; 1 while decoding."""
        return len(self.tokens) - self.computed

    def names_of_blocks(self, count: int, *, block_tokens: int) -> list[bytes]:
        """Return the names of its first ``count`` KV blocks, whose tokens must be known."""
        names, root = self.block_names, b"" if not self.adapter else b"adapter %d" % self.adapter
        for start in range(len(names) * block_tokens, count * block_tokens, block_tokens):
            names.append(block_name(names[-1] if names else root, self.tokens[start : start + block_tokens]))
        return names[:count]

    def take_scores(self) -> tuple[ScoredToken, ...]:
        """Return those of the prompt, once: with the first output token."""
        if self.scores is None:
            return ()
        scores, self.scores = tuple(self.scores), None
        return scores

    def finish_after(self, token: int, *, max_model_len: int) -> FinishReason | None:
        """Say whether ``token``, already appended, ends the sequence."""
        if self.matcher is not None:
            self.matcher.take(token)
            if self.matcher.has_failed:
                return FinishReason.ABORT
            if self.matcher.is_done:
                return FinishReason.STOP
        if token in self.stop_ids:
            return FinishReason.STOP
        if self.num_output >= self.sampling.max_tokens or len(self.tokens) >= max_model_len:
            return FinishReason.LENGTH
        return None
