"""Which tokens go into a micro-batch, who gives way when KV blocks run out, and how a request ends."""

import random
from collections.abc import Callable

import pytest

from engines.native.details import Details
from engines.native.kv_blocks import KVBlocks
from engines.native.scheduler import Batch, Output
from engines.native.sequence import Sequence, SequenceState
from engines.protocol import FinishReason, ScoredToken
from tests.unit.native.fake_model import Engine, undisturbed


def shape(batch: Batch | None) -> list[tuple[int, int, int, bool]]:
    """Return (key, start, count, samples) of each entry."""
    return [] if batch is None else [(e.sequence.key, e.start, e.count, e.samples) for e in batch.entries]


def prompt_of(length: int, *, first: int = 1) -> list[int]:
    return list(range(first, first + length))


# --- KV blocks ---


def test_kv_block_0_is_never_given_out() -> None:
    blocks = KVBlocks(num_blocks=5)
    assert (blocks.capacity, blocks.free, blocks.used) == (4, 4, 0)
    taken = blocks.take(4)
    assert taken == [1, 2, 3, 4]
    assert (blocks.free, blocks.used) == (0, 4)


def test_too_many_kv_blocks_are_all_or_nothing() -> None:
    blocks = KVBlocks(num_blocks=5)
    assert blocks.take(5) is None
    assert blocks.free == 4
    assert blocks.take(0) == []


def test_kv_blocks_given_back_are_given_out_again_in_their_order() -> None:
    blocks = KVBlocks(num_blocks=5)
    taken = blocks.take(3)
    assert taken is not None
    blocks.give_back(taken)
    assert blocks.take(3) == taken


def test_a_kv_block_given_back_twice_is_noticed() -> None:
    blocks = KVBlocks(num_blocks=3)
    taken = blocks.take(1)
    assert taken is not None
    blocks.give_back(taken)
    with pytest.raises(AssertionError, match="given back twice"):
        blocks.give_back(taken)


def test_fewer_kv_blocks_are_given_out_once_the_capacity_falls_and_all_again_once_it_rises() -> None:
    blocks = KVBlocks(num_blocks=9)
    taken = blocks.take(6)
    assert taken == [1, 2, 3, 4, 5, 6]
    blocks.resize(4)
    assert (blocks.capacity, blocks.most, blocks.free, blocks.used, blocks.num_above) == (4, 8, 0, 6, 2)
    assert blocks.take(1) is None
    blocks.give_back([2, 6])
    assert (blocks.free, blocks.used, blocks.num_above) == (0, 4, 1)
    assert (blocks.replace(5), blocks.used, blocks.num_above) == (2, 4, 0)
    assert blocks.replace(3) is None
    blocks.give_back([2])
    blocks.resize(8)
    assert (blocks.free, blocks.used, blocks.num_above) == (5, 3, 0)
    assert blocks.take(5) == [2, 5, 6, 7, 8]


def test_a_kv_block_above_the_capacity_given_back_twice_is_noticed() -> None:
    blocks = KVBlocks(num_blocks=5)
    blocks.take(4)
    blocks.resize(2)
    blocks.give_back([4])
    with pytest.raises(AssertionError, match="given back twice"):
        blocks.give_back([4])


@pytest.mark.parametrize("capacity", [0, 5])
def test_there_cannot_be_more_kv_blocks_than_address_space(capacity: int) -> None:
    with pytest.raises(ValueError, match="1 to 4 KV blocks"):
        KVBlocks(num_blocks=5).resize(capacity)


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_a_kv_cache_without_a_usable_block_cannot_be(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"not {num_blocks}"):
        KVBlocks(num_blocks=num_blocks)


# --- what goes into a micro-batch ---


def test_decodes_come_before_prefills_under_way_before_waiting_requests() -> None:
    engine = Engine(budget=6)
    engine.add(prompt_of(3))
    engine.step()
    engine.add(prompt_of(8))
    assert shape(engine.step()) == [(1, 3, 1, True), (2, 0, 5, False)]
    engine.add(prompt_of(4))
    assert shape(engine.step()) == [(1, 4, 1, True), (2, 5, 3, True), (3, 0, 2, False)]


def test_a_younger_decode_comes_before_an_older_prefill() -> None:
    engine = Engine(budget=4, micro_batches=2)
    engine.add(prompt_of(20))
    engine.dispatch()
    engine.add(prompt_of(3))
    engine.dispatch()
    engine.complete()
    engine.complete()
    engine.scheduler.micro_batches = 1
    assert shape(engine.dispatch()) == [(2, 3, 1, True), (1, 4, 3, False)]


def test_a_long_prompt_is_cut_into_chunks_of_the_budget() -> None:
    engine = Engine(budget=8)
    sequence = engine.add(prompt_of(20), max_tokens=2)
    assert [shape(engine.step())[0] for _ in range(4)] == [
        (1, 0, 8, False),
        (1, 8, 8, False),
        (1, 16, 4, True),
        (1, 20, 1, True),
    ]
    assert engine.tokens(sequence) == undisturbed(prompt_of(20), max_tokens=2)


def test_a_micro_batch_never_exceeds_the_budget() -> None:
    engine = Engine(budget=5)
    for length in (7, 1, 4, 9, 2):
        engine.add(prompt_of(length))
    while (batch := engine.dispatch()) is not None:
        assert 0 < sum(entry.count for entry in batch.entries) <= 5
        engine.complete()
    engine.assert_idle()


def test_at_most_max_num_seqs_run() -> None:
    engine = Engine(max_num_seqs=2)
    for _ in range(3):
        engine.add([1, 2])
    assert [key for key, *_ in shape(engine.step())] == [1, 2]
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting, engine.scheduler.num_live) == (2, 1, 3)


def test_a_micro_batch_takes_its_share_of_the_sequences() -> None:
    engine = Engine(micro_batches=3)
    for _ in range(7):
        engine.add([1, 2])
    batches = [engine.dispatch() for _ in range(3)]
    assert [[key for key, *_ in shape(batch)] for batch in batches] == [[1, 2, 3], [4, 5, 6], [7]]


def test_a_sequence_is_in_one_micro_batch_at_a_time() -> None:
    engine = Engine(micro_batches=2, budget=4)
    engine.add(prompt_of(8))
    assert shape(engine.dispatch()) == [(1, 0, 4, False)]
    assert engine.dispatch() is None
    engine.complete()
    assert shape(engine.dispatch()) == [(1, 4, 4, True)]


def test_nothing_to_do_is_no_micro_batch() -> None:
    assert Engine().scheduler.schedule() is None


def test_step_numbers_rise() -> None:
    engine = Engine()
    engine.add([1])
    first, second = engine.step(), engine.step()
    assert second.step_id > first.step_id


# --- KV blocks of sequences ---


def test_a_request_waits_while_those_running_need_the_room_to_grow() -> None:
    """One KV block each is left over for those running, so that an admission preempts nobody at once."""
    engine = Engine(num_blocks=1 + 4, block_tokens=4)
    first, second = engine.add(prompt_of(8), max_tokens=3), engine.add(prompt_of(5), max_tokens=2)
    assert [key for key, *_ in shape(engine.step())] == [1]  # 2 left: the second needs 2 and 1 is headroom
    engine.run()
    assert engine.scheduler.preemptions == 0
    for sequence in (first, second):
        assert engine.finish(sequence) is FinishReason.LENGTH
    engine.assert_idle()


def test_one_alone_may_take_every_kv_block() -> None:
    engine = Engine(num_blocks=1 + 4, block_tokens=4, max_model_len=16)
    sequence = engine.add(prompt_of(15), max_tokens=9)
    engine.run()
    assert len(engine.tokens(sequence)) == 1
    assert engine.finish(sequence) is FinishReason.LENGTH


def test_the_block_table_holds_the_kv_blocks_in_order() -> None:
    engine = Engine(block_tokens=4)
    one, two = engine.add(prompt_of(6)), engine.add(prompt_of(5))
    engine.step()
    for sequence in (one, two):
        assert engine.table[sequence.row, : len(sequence.block_ids)].tolist() == sequence.block_ids
    assert not set(one.block_ids) & set(two.block_ids)
    first, second = one.block_ids
    assert engine.scheduler.slots_of(one, 2, 6).tolist() == [4 * first + 2, 4 * first + 3, 4 * second, 4 * second + 1]


def test_live_slots_and_blocks_are_those_computed() -> None:
    engine = Engine(block_tokens=4)
    one, two = engine.add(prompt_of(6)), engine.add(prompt_of(4))
    engine.dispatch()
    assert len(engine.scheduler.live_slots()) == 0  # in flight is not computed yet
    assert engine.scheduler.live_blocks() == []
    engine.complete()
    assert engine.scheduler.live_blocks() == sorted(
        [(one.block_ids[0], 4), (one.block_ids[1], 2), (two.block_ids[0], 4)]
    )
    assert sorted(engine.scheduler.live_slots()) == sorted(engine.cells)


def preempting() -> tuple[Engine, Sequence, Sequence]:
    """Two requests of which the younger must give its KV blocks to the older at the next step."""
    engine = Engine(num_blocks=1 + 4, block_tokens=4)
    older, younger = engine.add(prompt_of(4), max_tokens=9), engine.add(prompt_of(4, first=9), max_tokens=9)
    while older.computed < 8:
        engine.step()
    return engine, older, younger


def test_the_youngest_gives_its_kv_blocks_back_and_keeps_its_tokens() -> None:
    engine, older, younger = preempting()
    known = list(younger.tokens)
    assert len(known) > 4
    assert shape(engine.step()) == [(older.key, 8, 1, True)]
    assert (younger.state, younger.computed, younger.row, younger.block_ids) == (SequenceState.WAITING, 0, -1, [])
    assert younger.tokens == known
    assert engine.scheduler.preemptions == 1


def test_of_several_the_youngest_gives_way() -> None:
    engine = Engine(num_blocks=1 + 6, block_tokens=4)
    oldest, middle, youngest = (engine.add(prompt_of(3), max_tokens=9) for _ in range(3))
    while oldest.computed < 8:
        engine.step()
    engine.step()
    assert [s.state is SequenceState.RUNNING for s in (oldest, middle, youngest)] == [True, True, False]
    engine.run()
    for sequence in (oldest, middle, youngest):
        assert engine.tokens(sequence) == undisturbed(prompt_of(3), max_tokens=9)


def test_the_preempted_is_computed_again_exactly() -> None:
    engine, older, younger = preempting()
    engine.run()
    assert engine.scheduler.preemptions > 0
    assert engine.tokens(older) == undisturbed(prompt_of(4), max_tokens=9)
    assert engine.tokens(younger) == undisturbed(prompt_of(4, first=9), max_tokens=9)
    engine.assert_idle()


def test_a_preempted_request_goes_before_one_that_never_ran() -> None:
    engine, older, younger = preempting()
    engine.add([30])
    engine.step()
    engine.scheduler.abort(older.key)
    assert shape(engine.step())[0][0] == younger.key


def test_who_is_in_flight_keeps_its_kv_blocks() -> None:
    engine = Engine(num_blocks=1 + 4, block_tokens=4, micro_batches=2)
    older, younger = engine.add(prompt_of(4), max_tokens=9), engine.add(prompt_of(4), max_tokens=9)
    while older.computed < 8:
        engine.dispatch()
        engine.dispatch()
        assert len(engine.in_flight) == 2
        held = list(younger.block_ids)
        engine.complete()
    engine.dispatch()
    assert younger.in_flight
    assert younger.block_ids == held
    engine.run()
    assert engine.tokens(older) == engine.tokens(younger) == undisturbed(prompt_of(4), max_tokens=9)


def test_the_older_waits_for_a_younger_in_flight_and_keeps_what_it_has() -> None:
    engine = Engine(num_blocks=1 + 6, block_tokens=4, max_model_len=24, budget=4, micro_batches=2)
    older, younger = engine.add(prompt_of(20)), engine.add(prompt_of(12))
    while engine.blocks.free or older.in_flight:
        engine.dispatch()
        engine.dispatch()
        engine.complete()
    computed = older.computed
    assert younger.in_flight
    assert computed > 0
    assert engine.dispatch() is None
    assert older.computed == computed
    engine.run()
    assert engine.tokens(older) == undisturbed(prompt_of(20), max_tokens=4)


@pytest.mark.parametrize("seed", range(100))
def test_every_request_ends_however_little_room_there_is(seed: int) -> None:
    """None is preempted for ever by others that are preempted for it."""
    rng = random.Random(seed)
    block_tokens, max_model_len = rng.choice([1, 2, 4]), rng.choice([12, 24, 32])
    engine = Engine(
        num_blocks=1 + -(-max_model_len // block_tokens) + rng.choice([0, 1, 3]),
        block_tokens=block_tokens,
        max_num_seqs=rng.randint(2, 6),
        budget=rng.randint(1, 8),
        max_model_len=max_model_len,
        micro_batches=rng.randint(1, 4),
    )
    for _ in range(rng.randint(2, 6)):
        engine.add(prompt_of(rng.randint(1, max_model_len - 1)), max_tokens=rng.randint(1, 12))
    engine.run(max_steps=1000)
    engine.assert_idle()


# --- how a request ends ---


def test_a_stop_token_ends_a_request_and_is_reported() -> None:
    expected = undisturbed([1, 2], max_tokens=9)
    stop = expected[3]
    engine = Engine()
    sequence = engine.add([1, 2], max_tokens=9, stop=[stop])
    engine.run()
    assert engine.tokens(sequence) == expected[: expected.index(stop) + 1]
    assert engine.finish(sequence) is FinishReason.STOP


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    engine = Engine()
    sequence = engine.add([99, 2, 99], max_tokens=3, stop=[99])
    engine.run()
    assert (len(engine.tokens(sequence)), engine.finish(sequence)) == (3, FinishReason.LENGTH)


def test_a_stop_token_at_the_very_end_is_a_stop() -> None:
    expected = undisturbed([1, 2], max_tokens=1)
    engine = Engine()
    sequence = engine.add([1, 2], max_tokens=1, stop=expected)
    engine.run()
    assert engine.finish(sequence) is FinishReason.STOP


def test_max_tokens_ends_a_request() -> None:
    engine = Engine()
    sequence = engine.add([1, 2], max_tokens=5)
    engine.run()
    assert engine.tokens(sequence) == undisturbed([1, 2], max_tokens=5)
    assert engine.finish(sequence) is FinishReason.LENGTH
    assert sequence.state is SequenceState.FINISHED


def test_the_end_of_the_context_ends_a_request() -> None:
    engine = Engine(max_model_len=12)
    sequence = engine.add(prompt_of(8), max_tokens=50)
    engine.run()
    assert len(sequence.tokens) == 12
    assert engine.finish(sequence) is FinishReason.LENGTH
    engine.assert_idle()


def test_tokens_generated_elsewhere_count_and_are_not_reported_again() -> None:
    expected = undisturbed([1, 2, 3], max_tokens=7)
    engine = Engine()
    sequence = engine.add([1, 2, 3], generated=expected[:4], max_tokens=7)
    engine.run()
    assert engine.tokens(sequence) == expected[4:]
    assert sequence.num_output == 7


def test_log_probabilities_go_only_to_those_who_asked() -> None:
    engine = Engine()
    asked, not_asked = engine.add([1], max_tokens=2, logprobs=True), engine.add([1], max_tokens=2)
    engine.run()
    assert [o.logprob for o in engine.outputs[asked.key]] == [-float(t) for t in engine.tokens(asked)]
    assert [o.logprob for o in engine.outputs[not_asked.key]] == [None, None]


def test_a_step_without_log_probabilities_has_none() -> None:
    engine = Engine()
    sequence = engine.add([1], logprobs=True)
    batch = engine.dispatch()
    assert batch is not None
    assert engine.scheduler.finish_step(batch, [7], None) == [Output(sequence.key, 7, None, None, cached=0)]


# --- abort ---


def waiting(engine: Engine) -> Sequence:
    return engine.add(prompt_of(3))


def running(engine: Engine) -> Sequence:
    sequence = engine.add(prompt_of(3))
    engine.step()
    return sequence


def in_flight(engine: Engine) -> Sequence:
    sequence = engine.add(prompt_of(3))
    engine.dispatch()
    return sequence


def in_flight_prefill(engine: Engine) -> Sequence:
    sequence = engine.add(prompt_of(30))
    engine.dispatch()
    return sequence


def crashed(engine: Engine) -> Sequence:
    sequence = running(engine)
    engine.crash()
    assert sequence.state is SequenceState.WAITING
    return sequence


def finished(engine: Engine) -> Sequence:
    sequence = engine.add(prompt_of(3), max_tokens=1)
    engine.step()
    return sequence


@pytest.mark.parametrize("reach", [waiting, running, in_flight, in_flight_prefill, crashed, finished])
def test_abort_in_every_state(reach: Callable[[Engine], Sequence]) -> None:
    engine = Engine()
    sequence = reach(engine)
    told = len(engine.tokens(sequence))
    engine.scheduler.abort(sequence.key)
    assert engine.scheduler.num_live == 0
    engine.run()
    assert len(engine.tokens(sequence)) == told  # not a token more
    assert sequence.state is SequenceState.FINISHED
    engine.assert_idle()


def test_abort_of_a_preempted_request() -> None:
    engine, older, younger = preempting()
    engine.step()
    assert younger.state is SequenceState.WAITING
    engine.scheduler.abort(younger.key)
    engine.run()
    assert engine.tokens(older) == undisturbed(prompt_of(4), max_tokens=9)
    engine.assert_idle()


def test_abort_in_flight_frees_when_the_step_ends() -> None:
    engine = Engine()
    sequence = in_flight(engine)
    other = engine.add([5], max_tokens=2)
    engine.scheduler.abort(sequence.key)
    assert engine.scheduler.kv_blocks_used == 1
    assert engine.complete() == []
    assert engine.scheduler.kv_blocks_used == 0
    engine.run()
    assert engine.tokens(other) == undisturbed([5], max_tokens=2)


def test_an_aborted_neighbour_does_not_shift_the_sampled_tokens() -> None:
    engine = Engine()
    sequences = [engine.add(prompt_of(3, first=first), max_tokens=3) for first in (1, 5, 9)]
    engine.dispatch()
    engine.scheduler.abort(sequences[1].key)
    engine.run()
    assert engine.tokens(sequences[0]) == undisturbed(prompt_of(3), max_tokens=3)
    assert engine.tokens(sequences[2]) == undisturbed(prompt_of(3, first=9), max_tokens=3)


def test_an_unknown_key_has_ended_already() -> None:
    engine = Engine()
    engine.scheduler.abort(77)
    engine.assert_idle()


def test_all_are_aborted_in_flight_and_waiting() -> None:
    engine = Engine()
    in_flight(engine)
    engine.add([5], max_tokens=2)
    engine.scheduler.abort_all()
    assert engine.complete() == []
    engine.assert_idle()


# --- crash ---


def test_after_a_crash_everything_is_computed_again_in_order_of_arrival() -> None:
    engine = Engine(budget=16, micro_batches=2)
    sequences = [engine.add(prompt_of(3, first=first), max_tokens=5) for first in (1, 11, 21)]
    engine.step()
    engine.dispatch()
    engine.crash()
    assert engine.scheduler.kv_blocks_used == 0
    assert [key for key, *_ in shape(engine.dispatch())] == [1, 2]
    engine.run()
    for sequence, first in zip(sequences, (1, 11, 21), strict=True):
        assert engine.tokens(sequence) == undisturbed(prompt_of(3, first=first), max_tokens=5)
    engine.assert_idle()


def test_one_aborted_in_flight_is_gone_after_a_crash() -> None:
    engine = Engine()
    sequence = in_flight(engine)
    engine.scheduler.abort(sequence.key)
    engine.crash()
    assert engine.dispatch() is None
    engine.assert_idle()


# --- fewer KV blocks while they are in use ---


def test_kv_blocks_above_the_capacity_are_copied_below_it_and_nobody_notices() -> None:
    engine = Engine(num_blocks=41)
    first, second = engine.add(prompt_of(12), max_tokens=8), engine.add(prompt_of(9), max_tokens=8)
    engine.step()
    engine.scheduler.abort(first.key)
    assert max(second.block_ids) > 3
    engine.resize(3)
    pairs = engine.relocate(99)
    assert len(pairs) == len(second.block_ids)
    assert second.block_ids == [target for _, target in pairs]
    engine.resize(16)
    engine.run()
    assert engine.tokens(second) == undisturbed(prompt_of(9), max_tokens=8)
    assert engine.scheduler.preemptions == 0


def test_where_too_few_are_left_the_youngest_gives_way_and_is_computed_again() -> None:
    engine = Engine(num_blocks=41, max_model_len=32)
    requests = [engine.add(prompt_of(14, first=n), max_tokens=10) for n in range(1, 5)]
    for _ in range(6):
        engine.step()
    assert engine.scheduler.kv_blocks_used > 10
    engine.resize(11)
    assert engine.scheduler.kv_blocks_above > 0
    pairs = engine.relocate(99)
    assert (engine.scheduler.kv_blocks_above, engine.scheduler.preemptions) == (0, 2)
    assert all(source > 11 >= target for source, target in pairs)
    engine.run()
    assert [engine.tokens(each) for each in requests] == [
        undisturbed(prompt_of(14, first=n), max_tokens=10) for n in range(1, 5)
    ]
    engine.assert_idle()


def test_what_is_in_flight_is_moved_when_its_step_has_ended() -> None:
    engine = Engine(num_blocks=41)
    engine.add(prompt_of(12), max_tokens=4)
    engine.dispatch()
    second = engine.add(prompt_of(12), max_tokens=4)
    engine.scheduler.micro_batches = 2
    engine.dispatch()
    engine.resize(4)
    assert engine.relocate(99) == []
    engine.complete()
    engine.complete()
    engine.relocate(99)
    assert engine.scheduler.kv_blocks_above == 0
    assert second.state is SequenceState.WAITING


def test_what_is_told_of_prompts_in_one_micro_batch_is_bounded() -> None:
    engine = Engine(num_blocks=3000, budget=8192, max_model_len=4096, max_num_seqs=4)
    told = [engine.add(range(1, 40), max_tokens=1) for _ in range(3)]
    for sequence in told:
        sequence.tokens = [1 + i % 30 for i in range(1500)]
        sequence.num_prompt = len(sequence.tokens)
        sequence.scores = []
    plain = engine.add([2 + i % 30 for i in range(900)], max_tokens=1)  # begins unlike the others
    seen = 0
    while (batch := engine.dispatch()) is not None:
        assert sum(entry.count for entry in batch.entries if entry.sequence is not plain) <= 2048
        seen += sum(entry.count for entry in batch.entries)
        engine.complete()
    assert seen == 3 * 1500 + 900
    engine.assert_idle()


def test_scores_of_a_prompt_come_once_in_order_and_survive_a_crash() -> None:
    def score(token: int) -> ScoredToken:
        return ScoredToken(token_id=token, logprob=-1.0, rank=1)

    engine = Engine(budget=4)
    sequence = engine.add(range(1, 11), max_tokens=3)
    sequence.scores = []
    reported = []
    for step in range(12):
        batch = engine.scheduler.schedule()
        if batch is None:
            break
        (entry,) = batch.entries
        if step == 1:  # the step in flight is lost with the KV cache
            engine.scheduler.recompute_all()
            assert [each.token_id for each in sequence.scores or ()] == [2, 3, 4, 5]
            continue
        known = len(sequence.scores or ())
        first, end = max(entry.start, known) + 1, min(entry.start + entry.count, 9) + 1
        scores = {0: [score(sequence.tokens[i]) for i in range(first, end)]} if sequence.scores is not None else {}
        tokens = [7] if entry.samples else []
        outputs = engine.scheduler.finish_step(batch, tokens, None, Details(tops={}, scores=scores))
        reported += [[each.token_id for each in output.prompt] for output in outputs]
    assert reported == [list(range(2, 11)), [], []]
