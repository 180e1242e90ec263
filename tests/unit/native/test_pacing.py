"""Rounds of KV copy leave the steps their time, keep to a cap, and end within their deadline."""

from math import inf

import pytest

from engines.native.pacing import COPY_SHARE, CopyPace

MIB = 1 << 20


def seconds_for(pace: CopyPace, *, pieces: int, busy_s: float, requests_run: bool = True) -> float:
    """Send pieces of 1 MiB that take ``busy_s`` each, one after the other, and return when the last one is due."""
    now_s = 0.0
    pace.begin(pieces * MIB)
    for _ in range(pieces):
        now_s = pace.send_s(MIB, now_s=now_s, requests_run=requests_run)
        pace.took(MIB, busy_s)
    return now_s


def test_copies_take_their_share_of_the_time_and_no_more() -> None:
    pace = CopyPace(cap_bytes_per_s=None, deadline_s=inf)
    took_s = seconds_for(pace, pieces=1000, busy_s=0.002)
    assert 1000 * 0.002 / took_s == pytest.approx(COPY_SHARE, rel=0.05)


def test_while_no_request_runs_nothing_waits() -> None:
    pace = CopyPace(cap_bytes_per_s=None, deadline_s=inf)
    assert seconds_for(pace, pieces=1000, busy_s=0.002, requests_run=False) == 0.0


def test_a_cap_holds_whatever_runs() -> None:
    for requests_run in (True, False):
        pace = CopyPace(cap_bytes_per_s=100 * MIB, deadline_s=1.0)
        took_s = seconds_for(pace, pieces=201, busy_s=1e-6, requests_run=requests_run)
        assert took_s == pytest.approx(2.0)


def test_a_cap_counts_for_what_is_slower_anyway() -> None:
    """Time that went by does not count as saved up."""
    pace = CopyPace(cap_bytes_per_s=MIB, deadline_s=inf)
    assert pace.send_s(MIB, now_s=100.0, requests_run=True) == 100.0
    assert pace.send_s(MIB, now_s=100.0, requests_run=True) == 101.0
    assert pace.send_s(MIB, now_s=105.0, requests_run=True) == 105.0
    assert pace.send_s(MIB, now_s=105.0, requests_run=True) == 106.0


def test_what_would_take_too_long_is_sent_as_fast_as_it_has_to_be() -> None:
    pace = CopyPace(cap_bytes_per_s=None, deadline_s=20.0)
    assert seconds_for(pace, pieces=1000, busy_s=0.01) == pytest.approx(10.0, rel=0.05)
