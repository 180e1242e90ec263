"""Figures of requests: what counts as served, as in time, and percentiles by nearest rank."""

import pytest

from planner.request_figures import RequestTimes, distribution, figures
from planner.workload import Slo


def request(*, at_s: float, first_s: float = 0.1, tokens: int = 11, tpot_s: float = 0.01) -> RequestTimes:
    return RequestTimes(
        arrival_s=at_s,
        first_token_s=at_s + first_s,
        end_s=at_s + first_s + (tokens - 1) * tpot_s,
        prompt_tokens=5,
        output_tokens=tokens,
    )


FAILED = RequestTimes(
    arrival_s=1.0, first_token_s=1.1, end_s=None, prompt_tokens=5, output_tokens=3, failure="broke off"
)


def test_goodput_counts_what_meets_both_targets() -> None:
    late, slow = request(at_s=0, first_s=0.9), request(at_s=0, tpot_s=0.2)
    found = figures([request(at_s=0), late, slow, FAILED], Slo(ttft_s=0.5, tpot_s=0.1))

    assert (found.requests, found.failed, found.attainment) == (4, 1, 0.25)
    assert found.duration_s == pytest.approx(2.1)
    assert found.goodput_per_s == pytest.approx(1 / 2.1)
    assert found.output_tokens_per_s == pytest.approx(33 / 2.1)
    assert found.ttft_s.count == 3


def test_one_token_has_no_time_per_token_and_misses_no_target_for_it() -> None:
    only = request(at_s=0, tokens=1)

    assert only.tpot_s is None
    assert only.meets(Slo(tpot_s=1e-9))


def test_percentiles_are_values_that_were_seen() -> None:
    found = distribution(range(1, 1001))

    assert found.percentiles == {"p50": 500, "p90": 900, "p95": 950, "p99": 990, "p99_9": 999}
    assert (found.mean, found.maximum) == (500.5, 1000)


def test_nothing_served_has_no_latency() -> None:
    found = figures([FAILED], Slo())

    assert (found.ttft_s.mean, found.requests_per_s, found.attainment) == (None, 0.0, 0.0)
