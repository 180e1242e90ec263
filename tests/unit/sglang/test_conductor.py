"""Commands reach all ranks at the same slot, and a commit happens at one. Ranks in a row, without SGLang."""

import threading
from typing import Any
from unittest.mock import ANY

import pytest

from tests.unit.sglang.row import DRAIN_SLOTS, LAYOUT, NEW_LAYOUT, RANKS, FakeBatch, FakeRequest, Row


@pytest.fixture
def row() -> Row:
    made = Row()
    made.answer_of = {
        "round": [{"sent_blocks": 9, "sent_bytes": 90 * rank, "remainder_blocks": rank} for rank in range(RANKS)],
        "commit_copy": [{"blocks": 2, "live": 77, "bytes": 0}] * RANKS,
        "checksums": [{"1": [5, 6]}, {"1": [5, 6]}, {}],
    }
    return made


def begun(row: Row) -> Row:
    row.ask("begin", 1, NEW_LAYOUT)
    row.run(2)
    row.replies.clear()
    return row


def test_requests_pass_by_and_commands_do_not(row: Row) -> None:
    row.ask("begin", 1, NEW_LAYOUT)
    row.run(1, requests=("a request",))
    row.run(1)
    assert [scheduler.taken for scheduler in row.schedulers] == [["a request"]] * RANKS
    assert row.seen == [[(0, ("begin", 1, LAYOUT, NEW_LAYOUT))]] * RANKS  # all at the same slot


def test_a_round_ends_when_all_ranks_have_sent(row: Row) -> None:
    begun(row).ask("round", 1)
    row.run(5)
    (reply,) = row.replies
    assert reply["result"] == {"sent_blocks": 9, "sent_bytes": 270, "remainder_blocks": 2}


def test_nothing_runs_from_the_copy_to_the_switch_and_all_ranks_switch_at_one_slot(row: Row) -> None:
    begun(row).ask("commit", 1, 1.0, True)
    ran = row.run(40)
    assert all(len(set(slot)) == 1 for slot in ran)  # never one rank without the others: that would deadlock
    (held,) = [slot for slot, (name, *_) in row.seen[0] if name == "hold"]
    (copied,) = [slot for slot, (name, *_) in row.seen[0] if name == "commit_copy"]
    (switched,) = {slot for seen in row.seen for slot, (name, *_) in seen if name == "switch"}
    assert held == copied < switched  # what was begun before has been run by every rank: it is on time in the copy
    begin = row.slot - 40
    assert {slot[0] for slot in ran[held - begin : switched - begin]} == {"no batch"}
    assert {slot[0] for slot in ran[switched - begin :]} == {"a batch"}
    assert row.replies[-1]["result"]["epoch"] == 1
    assert row.conductor.layout == NEW_LAYOUT


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"commit_copy": [{"blocks": 2, "live": live} for live in (77, 78, 77)]}, "do not agree"),
        ({"commit_copy": [{"blocks": 2, "live": 77}, {"error": "no memory"}, {"blocks": 2, "live": 77}]}, "no memory"),
        ({"checksums": [{"1": [5, 6]}, {"1": [5, 7]}, {}]}, "1 of 2 KV blocks of layer 1 differ"),
    ],
)
def test_what_fails_before_the_switch_leaves_the_old_layout(row: Row, answers: dict[str, Any], reason: str) -> None:
    row.answer_of |= answers
    begun(row).ask("commit", 1, 1.0, True)
    ran = row.run(40)
    assert reason in row.replies[-1]["error"]
    assert row.conductor.layout == LAYOUT
    assert ran[-1] == ["a batch"] * RANKS
    assert not any(name == "switch" for _, (name, *_) in row.seen[0])


def test_who_loses_no_layer_is_not_waited_for(row: Row) -> None:
    row.late = RANKS - 1
    begun(row).ask("commit", 1, 1.0, False)
    row.run(10)
    assert row.replies[-1]["result"] == {"epoch": 1, "remainder_blocks": 2, "drain_s": ANY}


def test_who_is_not_waited_for_must_agree_all_the_same(row: Row) -> None:
    row.late = RANKS - 1
    row.answer_of["commit_copy"] = [{"blocks": 2, "live": live} for live in (77, 77, 78)]
    begun(row).ask("commit", 1, 1.0, False)
    row.run(10)
    assert "do not agree" in row.replies[-1]["result"]["crash"]


def test_who_loses_a_layer_is_waited_for_in_a_slot_that_would_begin_a_batch(row: Row) -> None:
    """That slot is then the first of the new layout, and the wait counts as one in which a batch was held back."""
    row.late = 0
    begun(row).ask("commit", 1, 1.0, False)
    for scheduler in row.schedulers:
        scheduler.running_batch = ""  # which has something to begin in one slot only
    row.run(5)
    assert row.slots[0].held_back_s is None
    for scheduler in row.schedulers:
        scheduler.running_batch = "running"
    ((ticket, answer),) = row.held_up
    threading.Timer(0.02, row.conductor.on_answer, [ticket, 0, answer]).start()
    assert row.run(1) == [["a batch"] * RANKS]
    row.run(1)
    assert row.conductor._pause()["pause_s"] > 0.0


def test_a_daemon_that_comes_rolls_back_what_the_one_before_has_begun(row: Row) -> None:
    begun(row).ask("settle")
    ran = row.run(3)
    in_force = {"epoch": 0, "layout": LAYOUT, "last_number": 1, "crash": ""}
    assert row.replies[-1]["result"] == in_force
    assert [name for _, (name, *_) in row.seen[-1]] == ["begin", "release", "abandon", "release"]
    assert ran[-1] == ["a batch"] * RANKS


def test_a_daemon_that_comes_waits_for_the_commit_that_the_one_before_has_begun(row: Row) -> None:
    begun(row).ask("commit", 1, 1.0, True)
    row.run(1)
    row.ask("settle")
    row.run(40)
    committed, settled = row.replies
    assert committed["result"]["epoch"] == 1
    assert settled["result"] == {"epoch": 1, "layout": NEW_LAYOUT, "last_number": 1, "crash": ""}


def test_ranks_that_switch_at_different_slots_are_noticed(row: Row) -> None:
    """Then some batch has run under two layouts."""
    row.answer_of["switch"] = [{"slot": 7}, {"slot": 7}, {"slot": 8}]
    begun(row).ask("commit", 1, 1.0, False)
    row.run(10)
    reason = "a rank failed while it switched: slot 7, 7, 8, by rank, where it must be the same"
    assert row.replies[-1]["result"]["crash"] == reason


def test_a_daemon_that_comes_learns_of_a_commit_that_went_wrong(row: Row) -> None:
    row.answer_of["switch"] = [{}, {"error": "no memory"}, {}]
    begun(row).ask("commit", 1, 1.0, False)
    row.run(10)
    row.ask("settle")
    row.run(10)
    assert row.replies[-1]["result"]["crash"] == "a rank failed while it switched: no memory"


def test_batches_are_held_where_the_next_is_far(row: Row) -> None:
    """A slot without a batch after one with a batch: the results of that are on their way for the longest time."""
    begun(row)
    for turn in range(4):
        for scheduler in row.schedulers:
            scheduler.running_batch = "running" if turn == 2 else ""
        if turn == 1:
            row.ask("commit", 1, 1.0, False)
        row.run(1)
    (held,) = [slot for slot, (name, *_) in row.seen[0] if name == "hold"]
    assert held == row.slot - 1


@pytest.mark.parametrize("second", [[8, 9], [8, 10]])
def test_each_share_of_a_layer_is_compared_with_its_like(second: list[int]) -> None:
    """Two ranks in each stage hold a share each, which is not that of the other."""
    row = Row(group=2)
    row.answer_of = {
        "commit_copy": [{"blocks": 2, "live": 77}] * 6,
        "checksums": [{"1": [5, 6]}, {"1": [8, 9]}, {"1": [5, 6]}, {"1": second}, {}, {}],
    }
    begun(row).ask("commit", 1, 1.0, True)
    row.run(20)
    if second == [8, 9]:
        assert row.replies[-1]["result"]["epoch"] == 1
    else:
        assert "1 of 2 KV blocks of layer 1 differ" in row.replies[-1]["error"]


def test_a_rank_that_fails_to_switch_lets_no_batch_pass_and_it_is_told_at_once(row: Row) -> None:
    row.answer_of["switch"] = [{}, {"error": "gone"}, {}]
    begun(row).ask("commit", 1, 1.0, True)
    while not row.replies:  # not only when the slots go on: rank 0 may wait for the batch that does not pass
        (ran,) = row.run(1)
    assert "gone" in row.replies[0]["result"]["crash"]
    assert row.seen[1][-1] == (row.slot - 1, ("switch", *row.seen[1][-1][1][1:]))
    assert ran[1] == "no batch"
    assert row.run(20)[-1][1] == "no batch"


def test_a_rollback_ends_what_is_under_way(row: Row) -> None:
    row.mute = True  # the copies do not arrive
    begun(row).ask("round", 1)
    row.run(3)
    row.ask("abandon", 1)
    row.run(3)
    assert [reply.get("error", "") for reply in row.replies] == ["rolled back", ""]
    assert all(seen[-1][1] == ("abandon", 1) for seen in row.seen)
    row.ask("round", 1)
    row.run(1)
    assert "has not begun" in row.replies[-1]["error"]


def test_a_pause_holds_all_ranks_until_it_ends(row: Row) -> None:
    row.ask("hold")
    row.run(DRAIN_SLOTS)
    assert row.replies == []  # something may be in flight
    row.run(4)
    assert row.replies[-1]["result"] == {}
    row.ask("resume")
    assert row.run(3)[-1] == ["a batch"] * RANKS
    assert row.slots[0].held_by == set()


def test_sglangs_own_pause_is_kept_by_all_micro_batches(row: Row) -> None:
    for scheduler in row.schedulers:
        scheduler._engine_paused = True
    assert row.run(RANKS) == [["no batch"] * RANKS] * RANKS


def test_armed_failpoints_fail_where_they_are_named(row: Row) -> None:
    begun(row).ask("arm", "core.commit", "fail")
    row.ask("commit", 1, 1.0, False)
    row.run(30)
    assert "core.commit" in row.replies[-1]["error"]
    assert row.conductor.layout == LAYOUT


def test_what_was_prefilled_when_batches_were_held_is_neither_leaked_nor_lost(row: Row) -> None:
    scheduler, batch = row.schedulers[0], FakeBatch([FakeRequest(ended=True), FakeRequest()])
    row.slots[0].held_by.add("move")
    assert scheduler.get_next_batch_to_run("running", batch) == "no batch"
    assert not scheduler._pp_microbatches_drained()  # else SGLang would look for leaks
    assert scheduler._collect_inflight_batches() == [batch]  # where an abort looks
    row.slots[0].held_by.clear()
    assert not scheduler._pp_microbatches_drained()  # until its slot comes round
    scheduler.get_next_batch_to_run("running", batch)
    assert scheduler._pp_microbatches_drained()
    assert scheduler._collect_inflight_batches() == []


def test_a_held_batch_whose_requests_have_ended_does_not_keep_sglang_from_being_idle(row: Row) -> None:
    row.slots[0].held_by.add("move")
    row.schedulers[0].get_next_batch_to_run("running", FakeBatch([FakeRequest(ended=True)]))
    assert row.schedulers[0]._pp_microbatches_drained()


def test_it_is_known_since_when_something_was_held_back(row: Row) -> None:
    slots = row.slots[0]
    row.run(1)
    assert slots.held_back_s is None
    row.ask("hold")
    row.run(2)
    since_s = slots.held_back_s
    assert since_s is not None
    row.ask("resume")
    row.run(3)
    assert slots.held_back_s == since_s  # for the batch that comes next
    row.ask("hold")
    row.run(2)
    assert slots.held_back_s > since_s
