"""The trace of steps: told once, with the first dispatch of each epoch kept for the commit pause."""

import numpy as np

from engines.native.trace import StageTrace, StepTrace


def int32(*values: int) -> bytes:
    return np.array(values, dtype=np.int32).tobytes()


def test_a_trace_is_told_once() -> None:
    trace = StepTrace()
    trace.dispatched(1.0, 0)
    trace.ended(1.5, 0)
    trace.dispatched(2.0, 1)
    trace.ended(2.5, 1)
    assert trace.take() == ([1.5, 2.5], [0, 1], [1.0, 2.0])
    assert trace.take() == ([], [], [])


def test_the_ends_of_a_commit_pause_outlive_the_telling() -> None:
    trace = StepTrace()
    trace.ended(1.5, 0)
    trace.dispatched(2.0, 1)
    trace.dispatched(3.0, 1)
    trace.take()
    assert (trace.last_end_s, trace.first_dispatch_s) == (1.5, {1: 2.0})


def test_a_stage_tells_what_it_computed_once() -> None:
    trace = StageTrace()
    trace.computed(int32(10, 0), int32(1, 20), 0.004)
    trace.computed(int32(11), int32(1), 0.002)
    assert trace.take() == ([21, 1], [2, 1], [31, 12], [0.004, 0.002])
    assert trace.take() == ([], [], [], [])


def test_a_stage_that_nobody_asks_forgets_its_oldest_steps() -> None:
    trace = StageTrace()
    for each in range(2000):
        trace.computed(int32(each), int32(1), 0.001)
    tokens, _, context, _ = trace.take()
    assert len(tokens) < 1000
    assert context[-1] == 2000
