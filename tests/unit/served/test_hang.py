"""When an engine is taken for hung."""

from engines.served.hang import Pulse

START = Pulse(deadline_s=60.0, patience_s=600.0)


def watched(pulse: Pulse, *, seconds: range, pending: bool = True, steps: int | None = 5) -> Pulse:
    for now_s in seconds:
        pulse = pulse.seen(pending=pending, steps_total=steps, now_s=float(now_s))
    return pulse


def test_work_without_a_step_is_a_hang() -> None:
    pulse = watched(START, seconds=range(60))
    assert pulse.verdict(now_s=59.0) is None
    assert pulse.verdict(now_s=61.0) == "hung: work is pending and no step has finished for 61 s"


def test_no_answer_is_no_progress() -> None:
    pulse = watched(watched(START, seconds=range(2)), seconds=range(2, 70), steps=None)
    assert pulse.verdict(now_s=70.0) is not None


def test_an_idle_engine_is_never_hung() -> None:
    pulse = watched(START, seconds=range(500), pending=False)
    assert pulse.verdict(now_s=500.0) is None
    busy = watched(pulse, seconds=range(500, 540))  # the clock starts with the work
    assert busy.verdict(now_s=540.0) is None


def test_each_step_and_each_token_starts_the_clock_again() -> None:
    pulse = watched(START, seconds=range(50))
    assert watched(pulse, seconds=range(50, 51), steps=6).verdict(now_s=100.0) is None
    assert pulse.progressed(now_s=50.0).verdict(now_s=100.0) is None


def test_there_is_patience_while_it_says_that_it_loads_or_compiles() -> None:
    pulse = watched(START, seconds=range(50)).working_slowly(now_s=50.0)
    assert pulse.verdict(now_s=600.0) is None
    assert pulse.verdict(now_s=651.0) is not None
    assert pulse.progressed(now_s=100.0).verdict(now_s=161.0) is not None


def test_the_first_look_is_no_step() -> None:
    pulse = START.working_slowly(now_s=0.0).seen(pending=True, steps_total=0, now_s=1.0)
    assert pulse.slow_work
