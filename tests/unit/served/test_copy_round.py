"""Rounds of copies, as vLLM's engine core runs them for all ranks and each rank of SGLang its own."""

import sys

import pytest

from engines.served.plugin_path import SHARED

sys.path.append(str(SHARED))  # as the engines' interpreters have it

from flexpiped_served.copy_round import CopyRound
from flexpiped_served.moving import BUFFERS

Sent = list[tuple[int, list[int], list[int]]]


def round_of(count: int, sent: Sent, *, degree: int = 1) -> CopyRound:
    """Return a round in which pipeline rank 0 sends so many pieces of two layers and one KV block."""
    return CopyRound(
        {0: [([1, 2], [block]) for block in range(count)]},
        sent_blocks=count,
        degree=degree,
        block_bytes=10,
        send=lambda ticket, layers, blocks: sent.append((ticket, layers, blocks)),
        remainder=lambda: 7,
    )


def test_pieces_go_out_while_there_are_buffers_and_follow_what_is_acknowledged() -> None:
    sent: Sent = []
    copies = round_of(BUFFERS + 1, sent)
    copies.feed()
    assert [ticket for ticket, _, _ in sent] == list(range(BUFFERS))
    copies.acknowledge(0, 0, "")
    copies.feed()
    assert sent[-1] == (BUFFERS, [1, 2], [BUFFERS])
    for ticket in range(1, BUFFERS + 1):
        assert not copies.done.done()
        copies.acknowledge(0, ticket, "")
        copies.feed()
    expected = {"sent_blocks": BUFFERS + 1, "sent_bytes": (BUFFERS + 1) * 20, "remainder_blocks": 7}
    assert copies.done.result() == expected


def test_a_source_with_steps_of_its_own_sends_one_piece_at_a_time() -> None:
    sent: Sent = []
    copies = round_of(2, sent)
    copies.feed(at_most=1)
    assert [ticket for ticket, _, _ in sent] == [0]
    copies.feed(at_most=1)
    assert [ticket for ticket, _, _ in sent] == [0, 1]


def test_each_tensor_parallel_rank_acknowledges() -> None:
    copies = round_of(1, [], degree=2)
    copies.feed()
    copies.acknowledge(0, 0, "")
    copies.feed()
    assert not copies.done.done()
    copies.acknowledge(1, 0, "")
    copies.feed()
    assert copies.done.result()["sent_bytes"] == 40


def test_what_a_rank_cannot_take_fails_the_round_once() -> None:
    sent: Sent = []
    copies = round_of(BUFFERS + 1, sent)
    copies.feed()
    copies.acknowledge(0, 0, "no room")
    copies.acknowledge(0, 1, "no room either")
    copies.feed()
    assert len(sent) == BUFFERS
    with pytest.raises(RuntimeError, match=r"no room$"):
        copies.done.result()


def test_a_round_without_pieces_is_done_at_once() -> None:
    copies = CopyRound({}, sent_blocks=0, degree=1, block_bytes=10, send=lambda *_: None, remainder=lambda: 0)
    copies.feed()
    assert copies.done.done()
