"""The pure parts of the live comparison: its trace, the devices that a run had, and how close changes lie."""

import pytest

from planner.simulation.outcome import most_in_a_minute
from planner.traces import workload_of
from tests.bench.live_figures import Phase, devices_over_time, phased


def test_the_cv_jumps_and_comes_back_at_the_same_rate() -> None:
    phases = [Phase(cv=cv, seconds=400.0) for cv in (1.0, 5.0, 1.0)]
    trace = phased(phases, rate_per_s=5.0, seed=1)
    parts = [[e for e in trace if begin <= e.arrival_s < begin + 400.0] for begin in (0.0, 400.0, 800.0)]
    seen = [workload_of(part) for part in parts]
    assert [round(each.cv) for each in (seen[0], seen[2])] == [1, 1]
    assert seen[1].cv > 3
    assert all(each.rate_per_s == pytest.approx(5.0, rel=0.25) for each in seen)


def test_devices_count_over_time_from_change_to_change() -> None:
    marks = [
        {"after_s": 10.0, "message": "1 -> 2 stages: load 95%"},
        {"after_s": 30.0, "message": "back from 2 to 1 stage: 80 ms a request with 2 stages"},
    ]
    assert devices_over_time(marks, begins_with=1, until_s=100.0) == 10 + 2 * 20 + 70
    assert devices_over_time([], begins_with=1, until_s=100.0) == 100


def test_changes_are_counted_within_any_minute() -> None:
    assert most_in_a_minute([]) == 0
    assert most_in_a_minute([0.0, 50.0, 70.0, 109.0, 200.0]) == 3
