"""Workloads and targets as files have them."""

import pytest

from planner.errors import InvalidWorkload
from planner.workload import Slo, Workload, parse_workload


def test_nothing_said_is_a_calm_chat() -> None:
    assert parse_workload({}) == (Workload(), Slo())


def test_what_is_said_counts() -> None:
    workload, slo = parse_workload({"rate_per_s": 3, "cv": 4.5, "output_tokens_mean": 96, "slo": {"tpot_s": 0.02}})
    assert (workload.rate_per_s, workload.cv, workload.prompt_tokens_mean) == (3.0, 4.5, 256.0)
    assert workload.sequence_tokens_mean == 256 + 96
    assert slo == Slo(tpot_s=0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 1}, r"unknown key rate; known are: rate_per_s, cv, "),
        ({"slo": {"ttft": 1}}, r"unknown key slo\.ttft; known are: slo\.ttft_s, slo\.tpot_s"),
        ({"slo": 1}, r"slo must be a table"),
        ({"cv": "1"}, r"cv must be a number, not '1'"),
        ({"cv": True}, r"cv must be a number, not True"),
        ({"cv": -0.5}, r"cv must be a number at least 0, not -0\.5"),
        ({"rate_per_s": 0}, r"rate_per_s must be a number above 0"),
        ({"prompt_tokens_mean": 0.5}, r"prompt_tokens_mean must be a number at least 1"),
        ({"output_tokens_mean": float("nan")}, r"output_tokens_mean must be a number"),
        ({"slo": {"ttft_s": 0}}, r"slo\.ttft_s must be a positive number of seconds"),
    ],
)
def test_what_cannot_be_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidWorkload, match=message):
        parse_workload(values)
