"""The pure parts of the plugin: what must be sent, and in which pieces. They import nothing of vLLM."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.served.plugin_path import SHARED
from engines.vllm.command import PLUGIN

sys.path += [str(PLUGIN), str(SHARED)]  # as vLLM's interpreter has it

from flexpiped_served.failpoints import FAIL, SKIP, FailpointHit, Failpoints
from flexpiped_served.pieces import pieces_of
from flexpiped_vllm.kv_tracker import KVTracker

BLOCK = 16


def test_at_first_everything_live_must_be_sent() -> None:
    tracker = KVTracker({3, 5, 9})
    assert tracker.take({3, 5, 9}) == [3, 5, 9]
    assert tracker.take({3, 5, 9}) == []


@pytest.mark.parametrize(
    ("first", "end", "written"), [(0, 16, [7]), (0, 17, [7, 8]), (15, 16, [7]), (16, 33, [8, 9]), (5, 5, [])]
)
def test_a_step_marks_the_blocks_of_its_tokens(first: int, end: int, written: list[int]) -> None:
    tracker = KVTracker(())
    tracker.mark([7, 8, 9], first_token=first, end_token=end, block_tokens=BLOCK)
    assert tracker.take({7, 8, 9}) == written


def test_a_block_that_was_freed_is_sent_when_it_is_used_again() -> None:
    tracker = KVTracker({4})
    assert tracker.take(set()) == []  # freed before it was sent: nobody needs it
    tracker.mark([4], first_token=0, end_token=1, block_tokens=BLOCK)
    assert tracker.take({4}) == [4]


@given(
    target_of=st.dictionaries(st.integers(0, 40), st.integers(0, 3), max_size=12),
    blocks=st.lists(st.integers(0, 5000), unique=True, max_size=300),
    per_buffer=st.integers(1, 64),
)
def test_pieces_cover_everything_once_and_fit(target_of: dict[int, int], blocks: list[int], per_buffer: int) -> None:
    pieces = list(pieces_of(target_of, blocks, block_bytes=100, buffer_bytes=100 * per_buffer + 99))
    assert sorted((layer, block) for layers, some in pieces for layer in layers for block in some) == sorted(
        (layer, block) for layer in target_of for block in blocks
    )
    for layers, some in pieces:
        assert len({target_of[layer] for layer in layers}) == 1
        assert len(layers) * len(some) <= max(per_buffer, 1)


def test_failpoints_go_off_once_and_leave_out_each_time() -> None:
    points = Failpoints()
    points.arm("a", FAIL)
    points.arm("b", SKIP)
    with pytest.raises(FailpointHit, match="failpoint a"):
        points.hit("a")
    assert not points.hit("a")
    assert points.hit("b")
    assert points.hit("b")
    points.arm("", "")
    assert not points.hit("b")
