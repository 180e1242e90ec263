"""What is noted of the steps of vLLM's engine core. Nothing of vLLM is imported."""

import sys
from types import SimpleNamespace
from typing import Any

from engines.served.plugin_path import SHARED
from engines.vllm.command import PLUGIN

sys.path += [str(PLUGIN), str(SHARED)]  # as vLLM's interpreter has it

from flexpiped_vllm.steps import StepWatch


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
