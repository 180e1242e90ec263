"""Whatever happens in whatever order, every request says what it would have said undisturbed, and nothing leaks."""

from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engines.native.sequence import Sequence
from tests.unit.native.fake_model import VOCABULARY, Engine, cell, undisturbed

MAX_MODEL_LEN = 24
BLOCK_TOKENS = 4
TOKENS = st.integers(0, VOCABULARY - 1)


class SchedulerStates(RuleBasedStateMachine):
    """Requests come, are aborted, run and crash over a KV cache that holds little more than one of them, and moves."""

    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[int, list[int]] = {}
        self.aborted: set[int] = set()

    @initialize(
        spare_blocks=st.integers(0, 10),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
        micro_batches=st.integers(1, 3),
        caches_prefixes=st.sampled_from([True, True, True, False]),
    )
    def start(
        self, spare_blocks: int, max_num_seqs: int, budget: int, micro_batches: int, caches_prefixes: bool
    ) -> None:
        self.engine = Engine(
            num_blocks=1 + MAX_MODEL_LEN // BLOCK_TOKENS + spare_blocks,
            block_tokens=BLOCK_TOKENS,
            max_num_seqs=max_num_seqs,
            budget=budget,
            max_model_len=MAX_MODEL_LEN,
            micro_batches=micro_batches,
            caches_prefixes=caches_prefixes,
        )

    @rule(
        prompt=st.lists(TOKENS, min_size=1, max_size=MAX_MODEL_LEN - 1),
        max_tokens=st.integers(1, 12),
        stop=st.frozensets(TOKENS, max_size=3),
        resumed=st.integers(0, 5),
    )
    def add(self, prompt: list[int], max_tokens: int, stop: frozenset[int], resumed: int) -> None:
        whole = undisturbed(prompt, max_tokens=max_tokens, stop=stop, max_model_len=MAX_MODEL_LEN)
        self.add_known(prompt, whole, resumed, max_tokens, stop)

    @precondition(lambda self: self.engine.sequences)
    @rule(
        data=st.data(),
        shared=st.integers(1, MAX_MODEL_LEN - 1),
        own=st.lists(TOKENS, max_size=6),
        max_tokens=st.integers(1, 12),
    )
    def add_like_another(self, data: st.DataObject, shared: int, own: list[int], max_tokens: int) -> None:
        """It begins as one before it did, prompt and output."""
        like = self.engine.sequences[data.draw(st.sampled_from(sorted(self.engine.sequences)))]
        prompt = (like.tokens[:shared] + own)[: MAX_MODEL_LEN - 1]
        whole = undisturbed(prompt, max_tokens=max_tokens, max_model_len=MAX_MODEL_LEN)
        self.add_known(prompt, whole, 0, max_tokens, frozenset())

    def add_known(
        self, prompt: list[int], whole: list[int], resumed: int, max_tokens: int, stop: frozenset[int]
    ) -> None:
        known = min(resumed, len(whole) - 1)
        sequence = self.engine.add(prompt, generated=whole[:known], max_tokens=max_tokens, stop=stop)
        self.expected[sequence.key] = whole[known:]

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(s.key for s in self.live())))
        self.engine.scheduler.abort(key)
        self.aborted.add(key)

    @rule()
    def dispatch(self) -> None:
        self.engine.dispatch()

    @precondition(lambda self: self.engine.in_flight)
    @rule()
    def complete(self) -> None:
        self.engine.complete()

    @rule(steps=st.integers(1, 10))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            while self.engine.dispatch() is not None:
                pass
            if self.engine.in_flight:
                self.engine.complete()

    @rule()
    def crash(self) -> None:
        self.engine.crash()

    @precondition(lambda self: self.engine.moved is None and not self.engine.is_shrinking)
    @rule(keep=st.integers(0, 16))
    def begin_to_move(self, keep: int) -> None:
        self.engine.begin_move(keep=keep)

    @precondition(lambda self: self.engine.moved is not None)
    @rule()
    def copy_what_was_written(self) -> None:
        self.engine.copy_round()

    @precondition(lambda self: self.engine.moved is not None)
    @rule(is_committed=st.sampled_from([True, True, True, False]), micro_batches=st.integers(1, 3))
    def move_or_stay(self, is_committed: bool, micro_batches: int) -> None:
        while is_committed and self.engine.in_flight:
            self.engine.complete()
        self.engine.end_move(is_committed=is_committed)
        if is_committed:
            self.engine.scheduler.micro_batches = micro_batches

    @precondition(lambda self: self.engine.moved is None and not self.engine.is_shrinking)
    @rule(data=st.data())
    def another_number_of_kv_blocks(self, data: st.DataObject) -> None:
        least = MAX_MODEL_LEN // BLOCK_TOKENS
        self.engine.resize(data.draw(st.integers(least, self.engine.blocks.most)))

    @rule(most=st.integers(1, 4))
    def between_two_steps(self, most: int) -> None:
        self.engine.relocate(most)

    @invariant()
    def only_full_kv_blocks_are_shared_and_no_row_has_two_owners(self) -> None:
        sequences = self.engine.sequences.values()
        blocks = [block for sequence in sequences for block in sequence.block_ids]
        being_filled = [block for s in sequences for block in s.block_ids[s.computed // BLOCK_TOKENS :]]
        rows = [sequence.row for sequence in sequences if sequence.row >= 0]
        assert 0 not in blocks
        assert len(set(blocks)) == self.engine.scheduler.kv_blocks_used
        assert all(blocks.count(block) == 1 for block in being_filled)
        assert len(set(rows)) == len(rows) == self.engine.scheduler.num_running

    @invariant()
    def what_is_kept_for_others_is_in_nobodys_use_and_below_the_capacity(self) -> None:
        cached = self.engine.blocks.cached
        in_use = {block for sequence in self.engine.sequences.values() for block in sequence.block_ids}
        assert len(set(cached)) == len(cached) == self.engine.scheduler.kv_blocks_cached
        assert not in_use & set(cached)
        assert all(0 < block <= self.engine.scheduler.kv_capacity for block in cached)
        assert len(cached) <= self.engine.blocks.free + self.engine.scheduler.kv_blocks_above  # which take their places

    @invariant()
    def what_is_in_a_kv_block_of_a_name_is_what_the_name_says(self) -> None:
        """Whoever finds it reads what it would have computed."""
        for sequence in self.engine.sequences.values():
            names = sequence.names_of_blocks(sequence.computed // BLOCK_TOKENS, block_tokens=BLOCK_TOKENS)
            for index, block in enumerate(self.engine.blocks.find(names)):
                before = 0
                for token in sequence.tokens[: (index + 1) * BLOCK_TOKENS]:
                    before = cell(token, before)
                assert self.engine.cells[block * BLOCK_TOKENS + BLOCK_TOKENS - 1] == before

    @invariant()
    def kv_blocks_above_the_capacity_are_counted_and_free_ones_are_below(self) -> None:
        scheduler, blocks = self.engine.scheduler, self.engine.blocks
        taken = {block for sequence in self.engine.sequences.values() for block in sequence.block_ids}
        above = sum(block > scheduler.kv_capacity for block in taken)
        assert scheduler.kv_blocks_above == above
        assert above == 0 or self.engine.is_shrinking
        assert blocks.free == max(0, scheduler.kv_capacity - len(taken))

    @invariant()
    def a_sequence_is_in_one_micro_batch(self) -> None:
        keys = [entry.sequence.key for batch in self.engine.in_flight for entry in batch.entries]
        assert len(set(keys)) == len(keys)
        assert set(keys) == {s.key for s in self.engine.sequences.values() if s.in_flight}

    @invariant()
    def live_slots_are_what_live_blocks_hold(self) -> None:
        slots = sorted(self.engine.scheduler.live_slots().tolist())
        blocks = self.engine.scheduler.live_blocks()
        assert slots == sorted(block * BLOCK_TOKENS + i for block, valid in blocks for i in range(valid))

    @invariant()
    def what_was_said_is_right(self) -> None:
        for key, expected in self.expected.items():
            said = self.engine.tokens(self.engine.sequences[key])
            assert said == expected[: len(said)]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run()
        for key, expected in self.expected.items():
            sequence = self.engine.sequences[key]
            assert key in self.aborted or self.engine.tokens(sequence) == expected
            assert key in self.aborted or self.engine.finish(sequence) is not None
        self.engine.assert_idle()

    def live(self) -> list[Sequence]:
        return [s for s in self.engine.sequences.values() if s.key not in self.aborted and not self.engine.finish(s)]


TestSchedulerStates: Any = SchedulerStates.TestCase
TestSchedulerStates.settings = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
