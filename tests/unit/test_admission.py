"""Admission refuses what does not fit, says when to come back, and its counters return to zero."""

import pytest

from flexpiped.admission import Admission, AdmissionLimits, Overloaded, OverloadReason, Releases

LIMITS = AdmissionLimits(max_requests_in_flight=2, max_tokens_in_flight=100)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    return Admission(limits=LIMITS, clock=clock)


def in_flight(admission: Admission) -> tuple[int, int]:
    return admission.requests_in_flight, admission.tokens_in_flight


def test_a_request_too_many_is_refused(admission: Admission) -> None:
    with admission.admit(), admission.admit():
        with pytest.raises(Overloaded, match="2 requests are in flight, and at most 2 may be") as caught:
            admission.admit().__enter__()
        assert caught.value.reason is OverloadReason.TOO_MANY_REQUESTS
        assert caught.value.retry_after_s == 1
    assert in_flight(admission) == (0, 0)


def test_a_token_too_many_is_refused(admission: Admission) -> None:
    with admission.admit() as first, admission.admit() as second:
        admission.reserve(first, tokens=60)
        with pytest.raises(Overloaded) as caught:
            admission.reserve(second, tokens=41)
        assert caught.value.reason is OverloadReason.TOO_MANY_TOKENS
        admission.reserve(second, tokens=40)
        assert in_flight(admission) == (2, 100)
    assert in_flight(admission) == (0, 0)


def test_one_alone_is_admitted_however_large(admission: Admission) -> None:
    with admission.admit() as lease:
        admission.reserve(lease, tokens=1000)
    assert in_flight(admission) == (0, 0)


def test_a_scope_left_by_an_error_gives_everything_back(admission: Admission) -> None:
    def fail() -> None:
        with admission.admit() as lease:
            admission.reserve(lease, tokens=10)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert in_flight(admission) == (0, 0)


def test_retry_after_follows_the_rate_at_which_work_ends(clock: Clock) -> None:
    releases = Releases(clock=clock, window_s=30.0)
    assert releases.seconds_until(requests=1) == 1
    for _ in range(3):
        releases.add(100)
    assert releases.seconds_until(requests=1) == 10  # 3 in 30 s
    assert releases.seconds_until(tokens=50) == 5
    assert releases.seconds_until(tokens=10_000) == 60
    clock.now_s = 31.0
    assert releases.seconds_until(requests=1) == 1  # nothing known any more
