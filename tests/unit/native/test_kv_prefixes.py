"""Who finds whose KV blocks, and which of them are given up first."""

import pytest

from engines.native.kv_blocks import KVBlocks
from engines.native.kv_prefixes import block_name
from engines.native.sequence import Sequence
from engines.protocol import ScoredToken
from tests.unit.native.fake_model import Engine, undisturbed

TEXT = list(range(1, 13))  # three KV blocks of four


def names(count: int) -> list[bytes]:
    found = [b""]
    for number in range(count):
        found.append(block_name(found[-1], [number]))
    return found[1:]


def cached_of(engine: Engine, sequence: Sequence) -> int | None:
    return engine.outputs[sequence.key][0].cached


# --- names ---


def test_a_name_says_what_is_in_a_kv_block_and_before_it() -> None:
    first = block_name(b"", [1, 2])
    assert first == block_name(b"", [1, 2]) != block_name(b"", [2, 1])
    assert block_name(first, [3]) == block_name(first, [3]) != block_name(b"", [3])
    assert block_name(b"an adapter", [1, 2]) != first


# --- KV blocks with names ---


def test_what_nobody_uses_any_more_is_found_again_until_its_place_is_needed() -> None:
    blocks = KVBlocks(num_blocks=5)
    taken = blocks.take(3) or []
    for block, name in zip(taken, names(3), strict=True):
        blocks.name(block, name)
    blocks.give_back(taken)
    assert (blocks.used, blocks.free, blocks.num_cached) == (0, 4, 3)
    assert blocks.find(names(3)) == taken
    assert blocks.take(2) == [4, taken[2]]  # the end of a prefix goes first: without its beginning it is worth nothing
    assert blocks.find(names(3)) == taken[:2]


def test_a_shared_kv_block_is_free_when_all_its_owners_have_given_it_back() -> None:
    blocks = KVBlocks(num_blocks=3)
    [block] = blocks.take(1) or []
    blocks.name(block, b"name")
    blocks.share([block])
    assert (blocks.used, blocks.free, blocks.free_without([block])) == (1, 1, 1)
    blocks.give_back([block])
    assert blocks.cached == ()
    blocks.give_back([block])
    assert blocks.cached == (block,)
    assert (blocks.free, blocks.free_without([block])) == (2, 1)
    blocks.share([block])
    assert (blocks.used, blocks.cached) == (1, ())
    blocks.give_back([block])
    with pytest.raises(AssertionError, match="given back twice"):
        blocks.give_back([block])


def test_of_two_with_equal_contents_one_is_found() -> None:
    blocks = KVBlocks(num_blocks=4)
    first, second = blocks.take(2) or []
    blocks.name(first, b"name")
    blocks.name(second, b"name")
    assert blocks.find([b"name"]) == [first]
    blocks.give_back([first, second])
    assert blocks.cached == (first,)


def test_a_smaller_capacity_loses_what_is_kept_above_it() -> None:
    blocks = KVBlocks(num_blocks=5)
    taken = blocks.take(4) or []
    for block, name in zip(taken, names(4), strict=True):
        blocks.name(block, name)
    blocks.give_back(taken[:3])
    blocks.resize(2)
    assert blocks.find(names(4)) == [1, 2]
    assert (blocks.cached, blocks.num_above) == ((2, 1), 1)
    assert blocks.replace(4) == 2  # kept ones give way to those in use, and its name goes with it
    assert blocks.find(names(4)) == [1]
    assert blocks.find(names(4)[3:]) == [2]


def test_after_a_loss_nothing_is_found() -> None:
    blocks = KVBlocks(num_blocks=4)
    taken = blocks.take(2) or []
    for block, name in zip(taken, names(2), strict=True):
        blocks.name(block, name)
    blocks.give_back(taken[:1])
    blocks.forget_contents()
    assert (blocks.find(names(2)), blocks.cached, blocks.free) == ([], (), 2)
    blocks.give_back(taken[1:])
    assert (blocks.cached, blocks.free) == ((), 3)


# --- sequences that share them ---


def test_a_prompt_that_begins_as_another_is_computed_from_where_they_part() -> None:
    engine = Engine()
    first = engine.add(TEXT)
    engine.run()
    second = engine.add([*TEXT[:10], 30, 31])
    batch = engine.dispatch()
    assert batch is not None
    assert [(entry.start, entry.count) for entry in batch.entries] == [(8, 4)]
    engine.complete()
    engine.run()
    assert engine.tokens(second) == undisturbed([*TEXT[:10], 30, 31], max_tokens=4)
    assert (cached_of(engine, first), cached_of(engine, second)) == (0, 8)
    assert [output.cached for output in engine.outputs[second.key][1:]] == [None] * 3
    assert (engine.scheduler.prefix_queries, engine.scheduler.prefix_hits) == (24, 8)


def test_at_least_one_token_is_left_to_compute() -> None:
    engine = Engine()
    engine.add(TEXT)
    engine.run()
    again = engine.add(TEXT)
    engine.run()
    assert cached_of(engine, again) == 8
    assert engine.tokens(again) == undisturbed(TEXT, max_tokens=4)


def test_a_conversation_that_goes_on_finds_the_answer_too() -> None:
    engine = Engine()
    first = engine.add(TEXT[:6], max_tokens=7)
    engine.run()
    onward = [*TEXT[:6], *engine.tokens(first), 5, 6, 7]
    second = engine.add(onward)
    engine.run()
    assert cached_of(engine, second) == 12
    assert engine.tokens(second) == undisturbed(onward, max_tokens=4)


def test_those_that_run_are_found_too() -> None:
    engine = Engine()
    first = engine.add(TEXT, max_tokens=9)
    engine.step()
    second = engine.add([*TEXT, 7], max_tokens=9)
    engine.step()
    assert first.block_ids[:3] == second.block_ids[:3]
    assert engine.scheduler.kv_blocks_used == len({*first.block_ids, *second.block_ids}) == 5
    engine.scheduler.abort(first.key)
    engine.run()
    assert engine.tokens(second) == undisturbed([*TEXT, 7], max_tokens=9)
    engine.assert_idle()


def test_without_prefix_caching_nothing_is_kept_and_nothing_told() -> None:
    engine = Engine(caches_prefixes=False)
    for _ in range(2):
        sequence = engine.add(TEXT)
        engine.run()
    assert cached_of(engine, sequence) is None
    assert (engine.scheduler.kv_blocks_cached, engine.scheduler.prefix_queries) == (0, 0)


@pytest.mark.parametrize(("scored", "found"), [(0, 0), (3, 0), (6, 4), (11, 8)])
def test_a_prompt_whose_tokens_are_scored_finds_only_what_has_its_scores(scored: int, found: int) -> None:
    """As one that was preempted on its way: a score is made where the token before it is computed."""
    engine = Engine()
    engine.add(TEXT)
    engine.run()
    sequence = engine.add(TEXT)
    sequence.scores = [ScoredToken(token_id=token, logprob=0.0, rank=1) for token in TEXT[1 : 1 + scored]]
    batch = engine.dispatch()
    assert batch is not None
    assert batch.entries[0].start == found
    assert engine.scheduler.prefix_queries == len(TEXT)  # of the first one: this one would find more


def test_one_that_was_preempted_finds_what_it_left() -> None:
    engine = Engine(num_blocks=1 + 6, block_tokens=4)
    older, younger = engine.add(TEXT[:8], max_tokens=9), engine.add(TEXT[4:12], max_tokens=9)
    computed = 0
    while (batch := engine.dispatch()) is not None:
        computed += sum(entry.count for entry in batch.entries)
        engine.complete()
    assert engine.scheduler.preemptions > 0
    assert engine.scheduler.prefix_hits == 0  # it is counted when it comes, and it found nothing then
    assert computed < 2 * 16 + 8  # each token once, but for those of KV blocks whose place was needed
    for sequence, prompt in ((older, TEXT[:8]), (younger, TEXT[4:12])):
        assert engine.tokens(sequence) == undisturbed(prompt, max_tokens=9)


def test_after_a_crash_nothing_is_found() -> None:
    engine = Engine()
    engine.add(TEXT)
    engine.run()
    engine.crash()
    again = engine.add(TEXT)
    engine.run()
    assert cached_of(engine, again) == 0
    assert engine.tokens(again) == undisturbed(TEXT, max_tokens=4)


def test_what_is_kept_counts_as_live_for_a_handover() -> None:
    engine = Engine()
    engine.add(TEXT)
    engine.run()
    assert sum(valid for _, valid in engine.scheduler.live_blocks()) == 12  # of 15 computed: full KV blocks
    assert sorted(engine.scheduler.live_slots()) == sorted(engine.cells)[:12]
    engine.scheduler.drop_cached()
    assert engine.scheduler.live_blocks() == []


def test_those_in_turns_of_a_shared_kv_block_let_it_be_moved() -> None:
    """One of them would always be in flight: the others wait for it until the KV block is below the bound."""
    engine = Engine(num_blocks=41, budget=64, micro_batches=2)
    filler = engine.add([20] * 56, max_tokens=8)
    first = engine.add(TEXT, max_tokens=20)
    while first.computed < len(TEXT):
        engine.dispatch()
        engine.dispatch()
        engine.complete()
    second = engine.add(TEXT, max_tokens=20)
    while not (first.in_flight != second.in_flight and second.computed):
        while engine.dispatch() is not None:
            pass
        engine.complete()
    shared = second.block_ids[:2]
    assert first.block_ids[:2] == shared
    engine.scheduler.abort(filler.key)
    engine.resize(min(shared) - 1)
    for _ in range(4):
        while engine.dispatch() is not None:
            pass
        engine.complete()
    assert engine.scheduler.kv_blocks_above == 0
    assert not engine.finish(first)
    assert first.block_ids[:2] == second.block_ids[:2] != shared
    engine.resize(40)
    engine.run()
    assert engine.tokens(first) == engine.tokens(second) == undisturbed(TEXT, max_tokens=20)
    assert engine.scheduler.preemptions == 0
