"""Rounds of copies in vLLM's engine core, and what is noted of its steps. Nothing of vLLM is imported."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from engines.served.plugin_path import SHARED
from engines.vllm.command import PLUGIN

sys.path += [str(PLUGIN), str(SHARED)]  # as vLLM's interpreter has it

from flexpiped_served.moving import BUFFERS
from flexpiped_vllm.copy_round import CopyRound
from flexpiped_vllm.steps import StepWatch

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
    copies = round_of(2, [])
    copies.feed()
    copies.acknowledge(0, 0, "no room")
    copies.acknowledge(0, 1, "no room either")
    with pytest.raises(RuntimeError, match=r"no room$"):
        copies.done.result()


def test_a_round_without_pieces_is_done_at_once() -> None:
    copies = CopyRound({}, sent_blocks=0, degree=1, block_bytes=10, send=lambda *_: None, remainder=lambda: 0)
    copies.feed()
    assert copies.done.done()


class Scheduler:
    """As much of vLLM's as is watched: each step has one new request of three tokens, and gives one token."""

    def __init__(self) -> None:
        self.tokens = 3

    def schedule(self) -> Any:
        new = SimpleNamespace(prompt_token_ids=[1, 2, 3])
        return SimpleNamespace(
            total_num_scheduled_tokens=self.tokens, preempted_req_ids={"r"}, scheduled_new_reqs=[new]
        )

    def update_from_output(self, _scheduler_output: Any) -> Any:
        return {0: SimpleNamespace(outputs=[SimpleNamespace(new_token_ids=[9])])}


def test_steps_are_counted_and_told_of_before_they_go_out() -> None:
    scheduler, told = Scheduler(), list[Any]()
    watch = StepWatch(scheduler, epoch=lambda: 4, before_dispatch=told.append)
    output = scheduler.schedule()
    assert told == [output]
    scheduler.update_from_output(output)
    assert watch.totals == {
        "prompt_tokens_total": 3,
        "generated_tokens_total": 1,
        "preemptions_total": 1,
        "steps_total": 1,
    }
    trace = watch.take_trace()
    assert (trace["epochs"], len(trace["ends_s"]), len(trace["dispatches_s"])) == ([4], 1, 1)
    assert watch.take_trace()["ends_s"] == []


def test_an_empty_step_is_none() -> None:
    scheduler, told = Scheduler(), list[Any]()
    scheduler.tokens = 0
    watch = StepWatch(scheduler, epoch=lambda: 0, before_dispatch=told.append)
    scheduler.update_from_output(scheduler.schedule())
    assert (told, watch.totals["steps_total"]) == ([], 0)


def test_the_pause_of_a_commit_ends_with_the_next_step() -> None:
    scheduler = Scheduler()
    watch = StepWatch(scheduler, epoch=lambda: 0, before_dispatch=lambda _output: None)
    scheduler.schedule()
    [dispatched_s] = watch.take_trace()["dispatches_s"]
    watch.committed(dispatched_s)
    assert watch.pause_s is None
    scheduler.schedule()
    assert watch.pause_s is not None
    assert watch.pause_s >= 0.0
