"""What the next start will take, from what those before it took."""

import pytest

from planner.start_times import StartRecord, expected_start_s, remembered


def starts(*took_s: float, num_stages: int = 2, is_warm: bool = True) -> tuple[StartRecord, ...]:
    return tuple(StartRecord(num_stages=num_stages, is_warm=is_warm, took_s=each) for each in took_s)


def test_it_is_the_median_so_that_one_slow_start_counts_for_little() -> None:
    assert expected_start_s(starts(3.0, 2.0, 60.0), num_stages=2, is_warm=True) == 3.0


@pytest.mark.parametrize(("num_stages", "expected_s"), [(1, 2.0), (2, 2.0), (4, 4.0), (7, 8.0)])
def test_of_a_number_of_stages_that_never_started_the_nearest_counts(num_stages: int, expected_s: float) -> None:
    known = starts(2.0) + starts(4.0, num_stages=4) + starts(8.0, num_stages=8)
    assert expected_start_s(known, num_stages=num_stages, is_warm=True) == expected_s


def test_warm_and_cold_starts_are_kept_apart() -> None:
    known = starts(2.0) + starts(30.0, is_warm=False)
    assert expected_start_s(known, num_stages=2, is_warm=False) == 30.0
    assert expected_start_s(starts(2.0), num_stages=2, is_warm=False) is None


def test_only_the_last_of_each_kind_are_remembered() -> None:
    known = starts(99.0, is_warm=False)
    for took_s in range(20):
        [new] = starts(float(took_s))
        known = remembered(known, new)
    assert [each.took_s for each in known] == [99.0, *map(float, range(12, 20))]
