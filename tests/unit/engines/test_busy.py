"""How busy workers are, however often and by however many that is asked."""

import pytest

from engines.busy import BusyShares


class Worker:
    """One that computes for a share of the time."""

    def __init__(self, share: float) -> None:
        self.now_s = 100.0
        self.busy_s = 7.0
        self.rate = share
        self.shares = BusyShares(clock=lambda: self.now_s)

    def after(self, seconds: float) -> float | None:
        self.now_s += seconds
        self.busy_s += seconds * self.rate
        return self.shares.share(0, self.busy_s)


def test_the_first_reading_says_nothing() -> None:
    assert Worker(0.5).after(1.0) is None


def test_one_that_asks_seldom_is_told_of_all_the_time_since() -> None:
    worker = Worker(0.5)
    worker.after(1.0)
    worker.rate = 0.25
    assert worker.after(30.0) == pytest.approx(0.25)


@pytest.mark.parametrize("apart_s", [0.0001, 0.001, 0.04])
def test_one_that_asks_after_another_is_told_the_same(apart_s: float) -> None:
    """The second one once had the few steps of a moment, which were all or nothing."""
    worker = Worker(0.5)
    worker.after(1.0)
    first = worker.after(1.0)
    worker.rate = 0.0
    second = worker.after(apart_s)
    assert first == pytest.approx(0.5)
    assert second == pytest.approx(0.5, rel=0.05)


def test_what_is_long_ago_counts_no_more() -> None:
    worker = Worker(1.0)
    for _ in range(100):
        worker.after(0.1)
    worker.rate = 0.0
    found = [worker.after(0.1) for _ in range(30)]
    assert found[0] == pytest.approx(0.95, abs=0.03)
    assert found[-1] == pytest.approx(0.0)
    assert found == sorted(found, reverse=True)


def test_a_worker_that_was_started_again_begins_anew() -> None:
    worker = Worker(0.5)
    worker.after(1.0)
    worker.after(1.0)
    worker.busy_s = 0.0
    assert worker.after(1.0) is None
    assert worker.after(1.0) == pytest.approx(0.5)


def test_workers_are_apart() -> None:
    worker = Worker(0.5)
    worker.after(1.0)
    assert worker.shares.share(1, 3.0) is None


def test_many_readings_are_few() -> None:
    worker = Worker(0.5)
    for _ in range(10_000):
        worker.after(0.001)
    assert sum(map(len, worker.shares._readings.values())) < 60
