"""The load monitor: windows against the definition, and values that are absent."""

from itertools import pairwise
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.arrivals import Absence, Arrivals, ArrivalWindow
from planner.load import EngineSample, LoadMonitor
from planner.workload import Slo

GAPS_S = st.lists(st.floats(0.0, 20.0), min_size=0, max_size=120)


@given(gaps_s=GAPS_S, after_s=st.floats(0.0, 40.0))
def test_a_window_says_what_its_arrivals_say(gaps_s: list[float], after_s: float) -> None:
    window, now_s, times_s = ArrivalWindow(30.0, began_s=0.0), 0.0, list[float]()
    for gap_s in gaps_s:
        now_s += gap_s
        window.add(now_s)
        times_s.append(now_s)
    now_s += after_s
    statistics = window.statistics(now_s)
    inside = [at_s for at_s in times_s if at_s > now_s - 30]
    between = [second_s - first_s for first_s, second_s in pairwise(inside)]
    assert statistics.arrivals == len(inside)
    if now_s > 0:
        assert statistics.rate_per_s == pytest.approx(len(inside) / min(30.0, now_s))
    if len(between) >= 8 and sum(between) > 1e-3:
        assert statistics.cv == pytest.approx(pstdev(between) / mean(between), rel=1e-3, abs=1e-3)
    else:
        assert len(between) >= 8 or statistics.cv is Absence.TOO_FEW


def test_a_pause_counts_while_it_lies_in_the_window_and_not_when_only_its_end_does() -> None:
    window = ArrivalWindow(30.0, began_s=0.0)
    for at_s in (*range(10), *range(25, 36)):
        window.add(float(at_s))
    seen = [16.0, *[1.0] * 10]  # from 9 on
    assert window.statistics(38.5).cv == pytest.approx(pstdev(seen) / mean(seen))
    assert window.statistics(39.5).cv == pytest.approx(0.0, abs=1e-6)
    window.add(3600.0)
    for second in range(1, 11):
        window.add(3600.0 + second)
    assert window.statistics(3610.0).cv == pytest.approx(0.0, abs=1e-6)


def test_nobody_is_a_rate_of_zero_and_no_cv() -> None:
    (statistics,) = Arrivals([180.0], began_s=0.0).statistics(60.0)
    assert (statistics.rate_per_s, statistics.cv) == (0.0, Absence.TOO_FEW)


def test_regular_arrivals_have_no_cv_and_no_gradient_and_more_of_them_have() -> None:
    arrivals = Arrivals([100.0], began_s=0.0)
    for second in range(1, 101):
        arrivals.add(float(second))
    (regular,) = arrivals.statistics(100.0)
    assert regular.cv == pytest.approx(0.0, abs=1e-6)
    assert regular.gradient_per_s2 == pytest.approx(0.0, abs=0.001)
    for half_second in range(1, 101):
        arrivals.add(100.0 + half_second / 2)
    (rising,) = arrivals.statistics(150.0)
    assert rising.gradient_per_s2 == pytest.approx((2.0 - 1.0) / 50, rel=0.1)


def test_a_window_that_is_not_full_has_no_gradient() -> None:
    arrivals = Arrivals([100.0], began_s=0.0)
    arrivals.add(1.0)
    assert arrivals.statistics(50.0)[0].gradient_per_s2 is Absence.NOT_YET


def test_before_anything_happens_nothing_is_known() -> None:
    seen = LoadMonitor(began_s=0.0).observe(0.0)
    absent = (seen.ttft_s, seen.tpot_s, seen.queue_length, seen.kv_use, seen.latency_s, seen.windows[0].rate_per_s)
    assert absent == (Absence.NOT_YET,) * 6


def test_a_request_from_its_arrival_to_its_end() -> None:
    monitor = LoadMonitor(began_s=0.0)
    monitor.arrived("a", 1.0, prompt_tokens=30)
    assert monitor.observe(3.0).queue_age_s == 2.0
    monitor.first_token("a", 4.0)
    monitor.ended("a", 9.0, output_tokens=11, tpot_s=0.5)
    seen = monitor.observe(9.0)
    assert (seen.ttft_s, seen.tpot_s, seen.prompt_tokens_mean, seen.output_tokens_mean) == (3.0, 0.5, 30, 11)
    assert seen.queue_age_s == 0.0
    assert seen.latency_s == 3.0 + 10 * 0.5


def test_what_was_measured_long_ago_is_stale() -> None:
    monitor = LoadMonitor(began_s=0.0, stale_after_s=10.0, memory_s=60.0)
    monitor.arrived("a", 1.0)
    monitor.first_token("a", 2.0)
    monitor.sampled(2.0, EngineSample(running=1, waiting=2, kv_use=0.5))
    assert monitor.observe(12.0).queue_length == 2.0
    seen = monitor.observe(70.0)
    assert (seen.queue_length, seen.kv_use, seen.ttft_s) == (Absence.STALE,) * 3


def test_who_is_late_is_who_missed_a_target_or_has_waited_too_long_for_it() -> None:
    assert LoadMonitor(began_s=0.0).observe(1.0).late_share is Absence.UNSUPPORTED
    monitor = LoadMonitor(began_s=0.0, slo=Slo(ttft_s=1.0, tpot_s=0.1))
    assert monitor.observe(1.0).late_share is Absence.NOT_YET
    for number, ttft_s in enumerate((0.5, 0.9, 1.1)):
        monitor.arrived(number, 10.0)
        monitor.first_token(number, 10.0 + ttft_s)
    assert monitor.observe(11.2).late_share == pytest.approx(1 / 3)
    monitor.arrived("waits", 11.2)
    assert monitor.observe(12.0).late_share == pytest.approx(1 / 3)
    assert monitor.observe(12.3).late_share == pytest.approx(2 / 4)
    monitor.ended("waits", 12.4, output_tokens=3, tpot_s=0.2)
    assert monitor.observe(12.5).late_share == 1.0
    monitor.slo = Slo(ttft_s=2.0)
    assert monitor.observe(12.5).late_share == 0.0
    assert monitor.observe(12.5 + 60).late_share is Absence.STALE


def test_another_layout_forgets_the_latencies_of_the_old_one() -> None:
    monitor = LoadMonitor(began_s=0.0)
    monitor.arrived("a", 1.0)
    monitor.first_token("a", 2.0)
    monitor.layout_changed(2.0)
    assert monitor.observe(2.0).ttft_s is Absence.STALE


def test_a_request_that_never_ends_well_leaves_nothing_behind() -> None:
    monitor = LoadMonitor(began_s=0.0)
    monitor.arrived("a", 1.0)
    monitor.ended("a", 2.0)
    seen = monitor.observe(3.0)
    assert (seen.queue_age_s, seen.output_tokens_mean) == (0.0, Absence.NOT_YET)
