"""Nested cuts: coarse ones are among the finer ones, and as even as that allows."""

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from planner.cut_family import family_counts, nested_cuts


def slowest(seconds: list[float], cuts: tuple[int, ...]) -> float:
    return max(sum(seconds[first:end]) for first, end in pairwise((0, *cuts, len(seconds))))


def test_equal_pieces_are_halved() -> None:
    found = nested_cuts([1.0] * 8, family_counts(8))
    assert found == {8: (1, 2, 3, 4, 5, 6, 7), 4: (2, 4, 6), 2: (4,), 1: ()}


def test_a_family_doubles_up_to_its_limit() -> None:
    assert family_counts(8) == (1, 2, 4, 8)
    assert family_counts(6) == (1, 2, 4, 6)
    assert family_counts(1) == (1,)


def test_more_stages_than_pieces_are_left_out() -> None:
    assert set(nested_cuts([1.0, 2.0, 3.0], [1, 2, 4])) == {1, 2}


@given(st.lists(st.integers(1, 50).map(float), min_size=1, max_size=9), st.integers(1, 9))
def test_cuts_are_nested_and_each_choice_is_the_best_there_is(seconds: list[float], limit: int) -> None:
    found = nested_cuts(seconds, family_counts(min(limit, len(seconds))))
    allowed = tuple(range(1, len(seconds)))
    for count in sorted(found, reverse=True):
        cuts = found[count]
        assert len(cuts) == count - 1
        assert set(cuts) <= set(allowed)
        others = combinations(allowed, count - 1)
        assert slowest(seconds, cuts) == min(slowest(seconds, other) for other in others)
        allowed = cuts
