"""The trace of steps: told once, with the first dispatch of each epoch kept for the commit pause."""

from engines.native.trace import StepTrace


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
