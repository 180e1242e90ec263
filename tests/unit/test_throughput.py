"""Tokens per second from a counter."""

from flexpiped.throughput import TokenRate


def test_one_reading_is_no_rate() -> None:
    rate = TokenRate()
    assert rate.tokens_per_s is None
    rate.add(1.0, 100)
    assert rate.tokens_per_s is None
    rate.add(1.0, 110)
    assert rate.tokens_per_s is None


def test_the_rate_is_the_mean_over_the_window() -> None:
    rate = TokenRate(window_s=2.0)
    for second, total in enumerate([0, 1000, 1010, 1020, 1030]):
        rate.add(float(second), total)

    assert rate.tokens_per_s == 10.0


def test_a_counter_that_starts_again_starts_the_rate_again() -> None:
    rate = TokenRate()
    rate.add(0.0, 500)
    rate.add(1.0, 600)
    rate.add(2.0, 5)
    assert rate.tokens_per_s is None
    rate.add(3.0, 25)
    assert rate.tokens_per_s == 20.0
    rate.clear()
    assert rate.tokens_per_s is None
