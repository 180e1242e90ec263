"""Which KV blocks are free: given out, given back, and how many there may be."""

import pytest

from engines.native.kv_blocks import KVBlocks


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
