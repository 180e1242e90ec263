"""Planning again from an earlier answer: as right as without one, and its bounds are true of the new problem."""

import time
from contextlib import suppress
from dataclasses import replace

import pytest

from planner.budget import Budget
from planner.checker import check
from planner.errors import NoFeasiblePlan
from planner.placement import bottleneck_limit_ns
from planner.placement_problem import PlacementProblem
from planner.replanner import Replanner
from tests.support.placements import all_scores, brute_force, small_problem


def budget(limit_s: float = 60.0) -> Budget:
    """Return a budget of this process's own time: what others take of the machine does not shorten it."""
    return Budget(limit_s=limit_s, clock=time.process_time)


def changes(problem: PlacementProblem) -> list[PlacementProblem]:
    """One device gone, one with less room, one with more, one that is new."""
    first, *others = problem.places
    halved = replace(first, free_bytes=first.free_bytes // 2)
    grown = replace(first, free_bytes=first.free_bytes * 2)
    new = replace(first, name="new", device_ids=("new",), held={})
    found = [(halved, *others), (grown, *others), (*problem.places, new), problem.places]
    return [replace(problem, places=places) for places in ([tuple(others)] if others else []) + found]


@pytest.mark.parametrize("seed", range(40))
def test_a_session_finds_what_brute_force_finds(seed: int) -> None:
    session = Replanner()
    for problem in [small_problem(seed), *changes(small_problem(seed))]:
        best = brute_force(problem)
        if best is None:
            with pytest.raises(NoFeasiblePlan):
                session.place(problem, budget=budget())
            continue
        found = session.place(problem, budget=budget())
        assert tuple(proof.value for proof in found.proofs) == best
        assert check(problem, found) == ()


@pytest.mark.parametrize("seed", range(40))
def test_old_prices_give_true_bounds_with_hardly_any_time(seed: int) -> None:
    problem = small_problem(seed)
    session = Replanner()
    with suppress(NoFeasiblePlan):
        session.place(problem, budget=budget())
    for changed in changes(problem):
        scores = list(all_scores(changed))
        if not scores:
            continue
        found = session.place(changed, budget=budget(0.05))
        assert check(changed, found) == ()
        assert found.proofs[0].bound <= min(score.bottleneck_ns for score in scores)
        limit_ns = bottleneck_limit_ns(found.proofs[0].value)
        within = [score for score in scores if score.bottleneck_ns <= limit_ns]
        assert max(score.kv_tokens for score in within) <= found.proofs[1].bound
