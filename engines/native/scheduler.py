"""Continuous batching with chunked prefill over a paged KV cache. Plain and synchronous: no I/O, no clock.

A micro-batch is a set of sequences that go through the stages together; a sequence is in one micro-batch at a time.
When KV blocks run out, the youngest sequence gives its own back and is computed again later; no request fails for it.
A sequence that begins as one before it did shares the full KV blocks of what they have in common, if they are there.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engines.native.batch import Batch, Entry, Output
from engines.native.details import Details
from engines.native.kv_blocks import KVBlocks
from engines.native.sequence import Sequence, SequenceState
from engines.native.sequence_kv import SequenceKv
from engines.protocol import TopLogprobs

_SCORED_TOKENS = 2048  # of prompts in one micro-batch, so that what is told of them is a message of some 350 KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What one micro-batch and the whole engine may hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_block_tokens: int


class Scheduler:
    """The one writer of all sequences, of the KV blocks and of the shared block table.

    Args:
        caches_prefixes: Full KV blocks are kept for sequences to come.
    """

    def __init__(
        self,
        *,
        limits: SchedulerLimits,
        blocks: KVBlocks,
        table: npt.NDArray[np.int32],
        caches_prefixes: bool = True,
    ) -> None:
        self._limits = limits
        self._blocks = blocks
        self._kv = SequenceKv(
            blocks=blocks, table=table, block_tokens=limits.kv_block_tokens, caches_prefixes=caches_prefixes
        )
        self._rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._sequences: dict[int, Sequence] = {}
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._next_step = 0
        self._next_order = 0
        self.micro_batches = 1
        self.preemptions = 0
        self.prefix_queries = 0  # tokens that were looked for in the KV cache, once for each sequence
        self.prefix_hits = 0  # of those, tokens that were there

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_live(self) -> int:
        return len(self._sequences)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All that have not ended; one that was aborted in flight is not among them."""
        return (*self._sequences.values(),)

    @property
    def kv_blocks_used(self) -> int:
        return self._blocks.used

    @property
    def kv_blocks_cached(self) -> int:
        """How many nobody uses, but are kept for sequences to come."""
        return self._blocks.num_cached

    @property
    def kv_capacity(self) -> int:
        """How many KV blocks may be in use."""
        return self._blocks.capacity

    @property
    def kv_blocks_above(self) -> int:
        """How many are in use beyond a capacity that has become smaller; ``relocate`` ends that."""
        return self._blocks.num_above

    def resize_kv(self, capacity: int) -> None:
        """Give out KV blocks up to number ``capacity``."""
        self._blocks.resize(capacity)

    def relocate(self, most: int) -> list[tuple[int, int]]:
        """Replace KV blocks beyond the capacity by free ones within it, those of the oldest sequences first.

        While more are in use than the capacity, the youngest sequence gives its own back. One in flight keeps what it
        has until its step ends, so that it takes several calls.

        Returns:
            At most ``most`` pairs (from, to), to be copied before the next step.
        """
        while self._blocks.used > self._blocks.capacity:
            youngest = max(self._running, key=lambda s: s.order)
            if youngest.in_flight:
                break
            self._preempt(youngest)
        return self._kv.relocate(self._running, most)

    def drop_cached(self, *, keep: int = 0) -> None:
        """Of the KV blocks that nobody uses, keep those that were used last."""
        self._blocks.drop_cached(keep=keep)

    def take_order(self) -> int:
        self._next_order += 1
        return self._next_order

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.key] = sequence
        self._waiting.append(sequence)

    def abort(self, key: int) -> None:
        """Forget a sequence; one in flight is freed when its step ends. An unknown key has ended already."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return
        sequence.aborted = True
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
            sequence.state = SequenceState.FINISHED
        elif not sequence.in_flight:
            self._end(sequence)

    def abort_all(self) -> None:
        """Forget every sequence."""
        for key in tuple(self._sequences):
            self.abort(key)

    def schedule(self) -> Batch | None:
        """Return the next micro-batch, or None when nothing can run now.

        Decoding sequences come first, then prefills under way, then waiting requests, all within the token budget.
        A micro-batch takes at most its share of the running sequences, so that every stage has work.
        """
        budget = self._limits.max_num_batched_tokens
        share = -(-min(len(self._running) + len(self._waiting), self._limits.max_num_seqs) // self.micro_batches)
        scored = _SCORED_TOKENS
        entries: list[Entry] = []
        is_short = False  # of KV blocks: nobody is let in before those who run have theirs
        held = self._kv.waiting_for_a_move(self._running)
        ready = [s for s in self._running if not s.in_flight and s not in held]
        ready.sort(key=lambda s: (s.pending > 1, s.last_step, s.order))  # who has waited longest comes first
        for sequence in ready:
            if budget == 0 or len(entries) >= share:
                break
            if sequence.state is not SequenceState.RUNNING:  # preempted for an earlier entry
                continue
            count = min(sequence.pending, budget, scored if sequence.scores is not None else budget)
            if not count:
                continue
            if not self._ensure_blocks(sequence, sequence.computed + count):
                is_short = True
                continue
            entries.append(self._entry(sequence, count))
            budget -= count
            scored -= count if sequence.scores is not None else 0
        while self._waiting and not is_short and budget and len(entries) < share and self._rows:
            sequence = self._waiting[0]
            cached = self._kv.cached_prefix(sequence)
            left = sequence.pending - len(cached) * self._limits.kv_block_tokens
            count = min(left, budget, scored if sequence.scores is not None else budget)
            if not count or not self._admit(sequence, cached, count, is_alone=not self._running):
                break
            self._waiting.popleft()
            entries.append(self._entry(sequence, count))
            budget -= count
            scored -= count if sequence.scores is not None else 0
        if not entries:
            return None
        self._next_step += 1
        return Batch(self._next_step, tuple(entries))

    def finish_step(
        self, batch: Batch, tokens: list[int], logprobs: list[float] | None, details: Details | None = None
    ) -> list[Output]:
        """Take in the sampled tokens of ``batch`` (one per sampling entry, in order)."""
        outputs: list[Output] = []
        sampled = 0
        for index, entry in enumerate(batch.entries):
            sequence = entry.sequence
            sequence.in_flight = False
            sequence.computed += entry.count
            self._kv.name_filled(sequence, entry.start)
            token = None
            top: TopLogprobs = ()
            if details is not None and sequence.scores is not None:
                sequence.scores += details.scores.get(index, ())
            if entry.samples:
                token, logprob = tokens[sampled], logprobs[sampled] if logprobs is not None else None
                top = () if details is None else details.tops.get(sampled, ())
                sampled += 1
            if sequence.aborted:
                self._end(sequence)
                continue
            if token is None:
                continue
            sequence.tokens.append(token)
            finish = sequence.finish_after(token, max_model_len=self._limits.max_model_len)
            logprob = logprob if sequence.sampling.logprobs else None
            scores, cached = sequence.take_scores(), self._take_cached(sequence)
            outputs.append(Output(sequence.key, token, logprob, finish, top, scores, cached))
            if finish is not None:
                del self._sequences[sequence.key]
                self._end(sequence)
        return outputs

    def recompute_all(self) -> None:
        """After a crash: whatever was in flight or in the KV cache is lost, the tokens are not."""
        self._blocks.forget_contents()
        for sequence in sorted(self._running, key=lambda s: s.order, reverse=True):
            sequence.in_flight = False
            if sequence.aborted:
                self._end(sequence)
            else:
                self._preempt(sequence)

    def live_slots(self) -> npt.NDArray[np.int64]:
        """Return the token slots of the KV cache that somebody needs or may find (steps in flight not counted)."""
        return self._kv.live_slots(self._running)

    def live_blocks(self) -> list[tuple[int, int]]:
        """Return every KV block that holds computed tokens, with their number: only those slots are valid."""
        return sorted(self._kv.live(self._running).items())

    def slots_of(self, sequence: Sequence, start: int, end: int) -> npt.NDArray[np.int64]:
        """Return the token slots of positions ``start`` to ``end - 1``."""
        return self._kv.slots_of(sequence, start, end)

    def _entry(self, sequence: Sequence, count: int) -> Entry:
        sequence.in_flight = True
        sequence.last_step = self._next_step + 1
        return Entry(sequence, sequence.computed, count, count == sequence.pending)

    def _ensure_blocks(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence KV blocks for ``num_tokens``; False when it cannot run now.

        1. Younger sequences give theirs back, the youngest first, save those in flight.
        2. When all younger ones are in flight, it waits for their steps and keeps what it has: two sequences that
           gave way to each other in turn would compute their prompts again for ever.
        3. The youngest gives its own back.
        """
        missing = -(-num_tokens // self._limits.kv_block_tokens) - len(sequence.block_ids)
        if missing <= 0:
            return True
        while (taken := self._blocks.take(missing)) is None:
            younger = [s for s in self._running if s.order > sequence.order]
            idle = [s for s in younger if not s.in_flight]
            if idle:  # 1
                self._preempt(max(idle, key=lambda s: s.order))
                continue
            if not younger:  # 3
                self._preempt(sequence)
            return False
        self._kv.append(sequence, taken)
        return True

    def _admit(self, sequence: Sequence, cached: list[int], count: int, *, is_alone: bool) -> bool:
        """Start a waiting sequence behind ``cached`` if KV blocks are left over for those already running."""
        known = len(cached) * self._limits.kv_block_tokens
        needed = -(-(known + count) // self._limits.kv_block_tokens) - len(cached)
        headroom = 0 if is_alone else len(self._running)  # one more KV block each, so that it is not preempted at once
        if self._blocks.free_without(cached) < needed + headroom:
            return False
        self._blocks.share(cached)  # first: they are not to be taken for something else
        taken = self._blocks.take(needed)
        assert taken is not None
        sequence.row = self._rows.pop()
        sequence.state = SequenceState.RUNNING
        sequence.computed = known
        self._running.append(sequence)
        self._kv.append(sequence, cached + taken)
        self._note_hit(sequence, known)
        return True

    def _note_hit(self, sequence: Sequence, known: int) -> None:
        """Count what a new sequence finds; one that was preempted finds what it left itself."""
        if sequence.cached is None:
            sequence.cached = known
            if self._kv.caches_prefixes and sequence.scores is None:
                self.prefix_queries += len(sequence.tokens)
                self.prefix_hits += known

    def _take_cached(self, sequence: Sequence) -> int | None:
        """Return how many of its prompt's tokens it found, once; None also where nothing is kept."""
        if sequence.has_told_cached or not self._kv.caches_prefixes:
            return None
        sequence.has_told_cached = True
        return min(sequence.cached or 0, sequence.num_prompt)

    def _release(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._blocks.give_back(sequence.block_ids)
        self._rows.append(sequence.row)
        sequence.block_ids, sequence.row, sequence.computed, sequence.mirrored = [], -1, 0, 0

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.state = SequenceState.WAITING
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _end(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.state = SequenceState.FINISHED
