"""Exchanging places: what is found keeps the limits, and is never better than brute force says it can be."""

import pytest

from planner.checker import check_stages
from planner.first_guess import first_guess
from planner.near_search import look_near
from planner.placement import score
from planner.placement_search import Limits, PlacementSearch
from tests.bench.placement_instances import partly_used_hosts
from tests.support.placements import all_scores, small_problem


@pytest.mark.parametrize("seed", range(60))
def test_what_is_found_keeps_rules_and_limits(seed: int) -> None:
    problem = small_problem(seed)
    scores = sorted({each.bottleneck_ns for each in all_scores(problem)})
    start = first_guess(problem)
    if not start or problem.fixed_order:
        return
    search = PlacementSearch(problem, left_s=lambda: 60.0)
    for limit_ns in scores:
        limits = Limits(bottleneck_ns=limit_ns, kv_tokens=problem.min_kv_tokens)
        found = look_near(search, limits, start)
        if found is not None:
            assert check_stages(problem, found) == ()
            assert scores[0] <= score(problem, found).bottleneck_ns <= limit_ns


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scarce", [False, True])
def test_a_guess_comes_nearer_to_the_best(seed: int, scarce: bool) -> None:
    problem = partly_used_hosts(seed, scarce=scarce)
    start = first_guess(problem)
    search = PlacementSearch(problem, left_s=lambda: 60.0)
    limit_ns = score(problem, start).bottleneck_ns * 97 // 100
    found = look_near(search, Limits(bottleneck_ns=limit_ns, kv_tokens=problem.min_kv_tokens), start)
    assert found is not None
    assert check_stages(problem, found) == ()
    assert score(problem, found).bottleneck_ns <= limit_ns
