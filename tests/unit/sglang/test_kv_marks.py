"""What a rank of SGLang must still send. The plugin's part that knows nothing of SGLang."""

import sys

import pytest
import torch

from engines.served.plugin_path import SHARED

sys.path += [str(SHARED.parents[1] / "sglang" / "plugin"), str(SHARED)]  # as SGLang's interpreter has it

from flexpiped_sglang.kv_marks import KvMarks, fingerprint


def live(*blocks: int, count: int = 12) -> torch.Tensor:
    found = torch.zeros(count, dtype=torch.bool)
    found[list(blocks)] = True
    return found


def test_at_first_everything_live_must_be_sent() -> None:
    marks = KvMarks(live(3, 5, 9), block_tokens=1)
    assert marks.count == 3
    assert marks.take(live(3, 5, 9)) == [3, 5, 9]
    assert marks.take(live(3, 5, 9)) == []


@pytest.mark.parametrize(
    ("block_tokens", "slots", "written"), [(1, [4, 7], [4, 7]), (4, [4, 7], [1]), (4, [7, 8, 40], [1, 2, 10])]
)
def test_a_step_marks_the_blocks_of_its_slots(block_tokens: int, slots: list[int], written: list[int]) -> None:
    marks = KvMarks(live(), block_tokens=block_tokens)
    marks.mark(torch.tensor(slots))
    assert marks.take(live(*range(12))) == written


def test_padding_is_nobodys() -> None:
    marks = KvMarks(live(), block_tokens=1)
    marks.mark(torch.tensor([0, 2]))
    assert marks.take(live(*range(12))) == [2]


def test_a_block_that_was_freed_is_sent_when_it_is_used_again() -> None:
    marks = KvMarks(live(4), block_tokens=1)
    assert marks.take(live()) == []  # freed before it was sent: nobody needs it
    marks.mark(torch.tensor([4]))
    assert marks.take(live(4)) == [4]


def test_ranks_agree_only_about_the_same_blocks() -> None:
    assert fingerprint(live(1, 5)) == fingerprint(live(5, 1))
    assert fingerprint(live(1, 5)) != fingerprint(live(1, 6))
