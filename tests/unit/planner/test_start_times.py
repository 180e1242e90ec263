"""What the next start will take, from what those before it took."""

import pytest

from planner.start_times import (
    Origin,
    StartRecord,
    expected_replica_s,
    expected_start,
    expected_start_s,
    remembered,
)


def starts(*took_s: float, num_stages: int = 2, origin: Origin = Origin.PAGE_CACHE) -> tuple[StartRecord, ...]:
    return tuple(StartRecord(num_stages=num_stages, origin=origin, took_s=each) for each in took_s)


def test_it_is_the_median_so_that_one_slow_start_counts_for_little() -> None:
    assert expected_start_s(starts(3.0, 2.0, 60.0), num_stages=2, origin=Origin.PAGE_CACHE) == 3.0


@pytest.mark.parametrize(("num_stages", "expected_s"), [(1, 2.0), (2, 2.0), (4, 4.0), (7, 8.0)])
def test_of_a_number_of_stages_that_never_started_the_nearest_counts(num_stages: int, expected_s: float) -> None:
    known = starts(2.0) + starts(4.0, num_stages=4) + starts(8.0, num_stages=8)
    assert expected_start_s(known, num_stages=num_stages, origin=Origin.PAGE_CACHE) == expected_s


def test_of_an_origin_that_was_never_measured_the_likest_counts() -> None:
    known = starts(30.0, origin=Origin.STORAGE)
    assert expected_replica_s((), num_stages=2, origin=Origin.KEPT) is None
    assert expected_replica_s(known, num_stages=2, origin=Origin.KEPT) == 30.0
    known += starts(3.0)
    assert expected_replica_s(known, num_stages=2, origin=Origin.KEPT) == 3.0
    known += starts(2.0, origin=Origin.KEPT)
    assert [expected_replica_s(known, num_stages=2, origin=each) for each in Origin] == [30.0, 3.0, 2.0]


def test_what_it_takes_to_try_an_engine_out_is_known_apart_and_comes_to_it() -> None:
    tried = StartRecord(num_stages=4, origin=Origin.STORAGE, took_s=30.0, trial_s=5.0)
    known = (tried, *starts(2.0, 4.0))  # those were started again after a death: nobody tried them out
    assert expected_start_s(known, num_stages=2, origin=Origin.PAGE_CACHE) == 3.0
    assert expected_replica_s(known, num_stages=2, origin=Origin.PAGE_CACHE) == 8.0


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (Origin.KEPT, "ready in 1.2 s, as its parameters are kept in host memory (30 s from storage)"),
        (Origin.PAGE_CACHE, "ready in 3 s, as its files are in the page cache (30 s from storage)"),
        (Origin.STORAGE, "ready in 30 s, as its parameters come from storage"),
    ],
)
def test_a_decision_says_where_parameters_are_and_what_a_start_takes_without_them(origin: Origin, words: str) -> None:
    known = starts(1.2, origin=Origin.KEPT) + starts(3.0) + starts(30.0, origin=Origin.STORAGE)
    found = expected_start(known, num_stages=2, origin=origin)
    assert found is not None
    assert found.in_words == words
    never_cold = expected_start(starts(1.2, origin=Origin.KEPT), num_stages=2, origin=Origin.KEPT)
    assert never_cold is not None
    assert never_cold.in_words == "ready in 1.2 s, as its parameters are kept in host memory"


def test_warm_and_cold_starts_are_kept_apart() -> None:
    known = starts(2.0) + starts(30.0, origin=Origin.STORAGE)
    assert expected_start_s(known, num_stages=2, origin=Origin.STORAGE) == 30.0
    assert expected_start_s(starts(2.0), num_stages=2, origin=Origin.STORAGE) is None


def test_only_the_last_of_each_kind_are_remembered() -> None:
    known = starts(99.0, origin=Origin.STORAGE)
    for took_s in range(20):
        [new] = starts(float(took_s))
        known = remembered(known, new)
    assert [each.took_s for each in known] == [99.0, *map(float, range(12, 20))]
