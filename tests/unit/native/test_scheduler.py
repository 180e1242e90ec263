"""Which tokens go into a micro-batch, and who gives way when KV blocks run out."""

import random

import pytest

from engines.native.sequence import SequenceState
from engines.protocol import FinishReason
from tests.unit.native.fake_model import Engine, preempting, prompt_of, shape, undisturbed

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
