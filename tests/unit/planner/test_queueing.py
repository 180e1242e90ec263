"""Waiting times against the closed forms that are exact, and the directions in which they must move."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.queueing import Wait, both_percentile_s, both_within, crowd_within, pool_wait, tandem_wait, thinned_cv


def test_one_place_with_poisson_arrivals_is_the_exact_queue() -> None:
    """M/M/1: the mean wait is rho / (mu - lambda)."""
    wait = pool_wait(load=0.5, inside=0.5, slots=1, capacity_per_s=2.0, arrival_cv=1.0, service_cv=1.0)
    assert wait.chance >= 0.5
    tandem = tandem_wait(rate_per_s=1.0, slowest_s=0.5, arrival_cv=1.0, service_cv=1.0)
    assert tandem.mean_s == pytest.approx(0.5 / (2 - 1))
    assert tandem.chance_within(0) == 0.5


def test_constant_service_halves_the_wait() -> None:
    """M/D/1 waits half as long as M/M/1."""
    one = tandem_wait(rate_per_s=1.0, slowest_s=0.5, arrival_cv=1.0, service_cv=1.0)
    half = tandem_wait(rate_per_s=1.0, slowest_s=0.5, arrival_cv=1.0, service_cv=0.0)
    assert half.mean_s == pytest.approx(one.mean_s / 2)


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_many_places_at_little_load_wait_less(slots: int) -> None:
    busy = pool_wait(load=0.9, inside=0.9 * slots, slots=slots, capacity_per_s=1.0, arrival_cv=1.0, service_cv=1.0)
    calm = pool_wait(load=0.3, inside=0.3 * slots, slots=slots, capacity_per_s=1.0, arrival_cv=1.0, service_cv=1.0)
    assert calm.mean_s < busy.mean_s


def test_a_wait_of_no_length_is_over_at_once() -> None:
    """As where nothing varies, or at so little load that its length is less than a number can say."""
    assert Wait(chance=0.6, mean_if_any_s=0.0).chance_within(0.0) == 1.0
    assert Wait(chance=0.6, mean_if_any_s=0.0).chance_within(-1.0) == 0.0


def test_a_load_above_capacity_waits_for_ever() -> None:
    for wait in (
        pool_wait(load=1.0, inside=8, slots=8, capacity_per_s=1.0, arrival_cv=1.0, service_cv=1.0),
        tandem_wait(rate_per_s=2.0, slowest_s=0.5, arrival_cv=1.0, service_cv=1.0),
    ):
        assert wait.mean_s == inf
        assert wait.chance_within(1e9) == 0.0


@given(load=st.floats(0.0, 0.99), slots=st.integers(1, 1024), cv=st.floats(0.0, 8.0), more=st.floats(0.0, 2.0))
def test_bursts_never_help(load: float, slots: int, cv: float, more: float) -> None:
    calm, bursty = (
        pool_wait(load=load, inside=load * slots, slots=slots, capacity_per_s=3.0, arrival_cv=each, service_cv=1.0)
        for each in (cv, cv + more)
    )
    assert 0 <= calm.chance <= 1
    assert calm.mean_s <= bursty.mean_s + 1e-12
    assert both_within(calm, calm, 1.0) >= both_within(bursty, bursty, 1.0) - 1e-12


def test_crowds_are_narrow_in_calm_traffic() -> None:
    assert crowd_within(mean=100, limit=130, arrival_cv=0.1) > crowd_within(mean=100, limit=130, arrival_cv=4.0) > 0.5
    assert crowd_within(mean=0, limit=0, arrival_cv=1.0) == 1.0


def test_replicas_spread_bursts() -> None:
    assert thinned_cv(4.0, replicas=1) == 4.0
    assert thinned_cv(1.0, replicas=9) == 1.0
    assert thinned_cv(5.0, replicas=8) == 2.0
    assert thinned_cv(0.0, replicas=2) == pytest.approx(0.5**0.5)


def test_percentiles_of_two_waits_are_those_of_the_chance_to_wait_no_longer() -> None:
    pool = pool_wait(load=0.9, inside=50, slots=64, capacity_per_s=10.0, arrival_cv=2.0, service_cv=1.0)
    tandem = tandem_wait(rate_per_s=1.0, slowest_s=0.5, arrival_cv=2.0, service_cv=1.0)
    p99_s = both_percentile_s(pool, tandem, 0.99)
    assert both_within(pool, tandem, p99_s) == pytest.approx(0.99)
    calm = tandem_wait(rate_per_s=0.001, slowest_s=0.5, arrival_cv=1.0, service_cv=1.0)
    assert both_percentile_s(calm, calm, 0.99) == 0
