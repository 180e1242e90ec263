"""The placement solver against every placement there is, its bounds, its refusals and its time."""

import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.budget import Budget
from planner.checker import check
from planner.errors import NoFeasiblePlan, PlanTimeout
from planner.placement import Aim, Placement, bottleneck_limit_ns
from planner.placement_problem import Charge, Hops, Piece, Place, PlacementProblem, merged
from planner.placement_solver import place
from tests.support.placements import all_scores, brute_force, small_problem
from topology.units import GIB

QUICK = range(60)
ALL = range(60, 660)
# found by long runs: an end reached too greedily, a tied table counted twice, links of places that are not there, a
# latency limit that rules all out
TRICKY = (364, 637, 1019, 1373, 1891, 2052)


def solve(problem: PlacementProblem, *, limit_s: float = 60.0) -> Placement:
    return place(problem, budget=Budget(limit_s=limit_s, clock=time.monotonic))


def device(name: str, **values: object) -> Place:
    given: dict[str, object] = {"name": name, "device_ids": (name,), "speed_class": 0, "free_bytes": 100, "host": name}
    return Place(**{**given, **values})  # type: ignore[arg-type]


def even_problem(*, pieces: int, devices: int, stages: int, **values: object) -> PlacementProblem:
    given: dict[str, object] = {
        "pieces": (Piece(weight_bytes=10, kv_bytes_per_token=1),) * pieces,
        "class_ns": ((100,) * pieces,),
        "places": tuple(device(f"gpu{index}") for index in range(devices)),
        "num_stages": stages,
        "hops": Hops(network_ns=20),
    }
    return PlacementProblem(**{**given, **values})  # type: ignore[arg-type]


def equals_brute_force(problem: PlacementProblem) -> None:
    best = brute_force(problem)
    if best is None:
        with pytest.raises(NoFeasiblePlan, match=r"\d"):
            solve(problem)
        return
    found = solve(problem)
    assert tuple(proof.value for proof in found.proofs) == best
    assert found.optimal
    assert check(problem, found) == ()


@pytest.mark.parametrize("seed", [*QUICK, *TRICKY])
def test_small_problems_equal_brute_force(seed: int) -> None:
    equals_brute_force(small_problem(seed))


@pytest.mark.parametrize("seed", range(16))
def test_problems_with_a_kv_budget_equal_brute_force(seed: int) -> None:
    budget = random.Random(seed).choice([20, 40, 80, 200])
    equals_brute_force(replace(small_problem(seed), kv_budget_bytes=budget))


@pytest.mark.long
@pytest.mark.parametrize("seed", ALL)
def test_many_small_problems_equal_brute_force(seed: int) -> None:
    equals_brute_force(small_problem(seed))


def test_brute_force_has_seen_both_answers() -> None:
    answers = [brute_force(small_problem(seed)) is None for seed in QUICK]
    assert 5 < sum(answers) < 50


@settings(max_examples=40, deadline=None)
@given(st.integers(min_value=10_000, max_value=10_000_000), st.floats(min_value=0.0, max_value=0.02))
def test_whatever_the_time_the_bounds_are_true_and_the_plan_keeps_the_rules(seed: int, limit_s: float) -> None:
    problem = small_problem(seed)
    scores = list(all_scores(problem))
    try:
        found = solve(problem, limit_s=limit_s)
    except NoFeasiblePlan:
        assert not scores
        return
    except PlanTimeout:
        return
    assert check(problem, found) == ()
    best = min(score.bottleneck_ns for score in scores)
    assert found.proofs[0].bound <= best <= found.proofs[0].value
    within = [score for score in scores if score.bottleneck_ns <= bottleneck_limit_ns(found.proofs[0].value)]
    assert found.proofs[1].value <= max(score.kv_tokens for score in within) <= found.proofs[1].bound


def test_what_cannot_be_has_the_numbers() -> None:
    with pytest.raises(NoFeasiblePlan, match=r"5 stages were asked for; .* 4 devices are free, so at most 4"):
        solve(even_problem(pieces=8, devices=4, stages=5))
    large = replace(
        even_problem(pieces=3, devices=3, stages=2),
        pieces=(Piece(weight_bytes=47 * GIB, kv_bytes_per_token=0),) * 3,
        places=tuple(device(f"gpu{index}", free_bytes=48 * GIB) for index in range(3)),
    )
    with pytest.raises(NoFeasiblePlan, match="needs 141 GiB, the largest set of 2 free devices offers 96 GiB"):
        solve(large)
    one_heavy = (large.pieces[0], *(Piece(weight_bytes=GIB, kv_bytes_per_token=0),) * 2)
    smaller = tuple(device(f"gpu{index}", free_bytes=46 * GIB) for index in range(3))
    with pytest.raises(NoFeasiblePlan, match="the largest piece needs 47 GiB, the roomiest device offers 46 GiB"):
        solve(replace(large, pieces=one_heavy, places=smaller))
    with pytest.raises(NoFeasiblePlan, match=r"a step takes 0[.]000\d+ ms at least, 0[.]0003 ms are allowed"):
        solve(even_problem(pieces=3, devices=3, stages=2, latency_limit_ns=300))


def test_no_time_is_not_no_plan() -> None:
    with pytest.raises(PlanTimeout, match="nothing found in 0 s for 2 stages"):
        solve(even_problem(pieces=3, devices=3, stages=2, latency_limit_ns=1000), limit_s=0.0)


def test_neighbouring_stages_share_a_host_where_its_links_are_faster() -> None:
    places = tuple(device(f"gpu{i}", host=f"host{i % 3}") for i in range(6))
    hops = Hops(network_ns=50, same_host_ns={"host0": 5, "host1": 5, "host2": 30})
    found = solve(even_problem(pieces=4, devices=0, stages=2, places=places, hops=hops))
    assert {places[stage.place].host for stage in found.stages} <= {"host0", "host1"}
    assert found.scores.bottleneck_ns == 205


def test_whole_devices_and_islands_are_kept_for_others() -> None:
    island = Charge(device_ids=frozenset({"gpu0", "gpu1"}), points=10)
    problem = even_problem(
        pieces=4, devices=5, stages=2, charges=(island, Charge(device_ids=frozenset({"gpu2"}), points=1))
    )
    found = solve(problem)
    assert sorted(problem.places[stage.place].name for stage in found.stages) == ["gpu3", "gpu4"]
    tight = replace(problem, num_stages=3)
    assert solve(tight).scores.fragmentation == 1


def test_what_is_there_stays_there() -> None:
    places = (device("gpu0"), device("gpu1", held={2: 10, 3: 10}), device("gpu2", held={0: 10, 1: 10}))
    found = solve(even_problem(pieces=4, devices=0, stages=2, places=places))
    assert [stage.place for stage in found.stages] == [2, 1]
    assert (found.scores.change_ns, found.scores.moved_bytes) == (0, 0)


def test_a_group_of_devices_is_one_place_and_excludes_its_members() -> None:
    pair = Place(name="pair", device_ids=("gpu0", "gpu1"), speed_class=1, free_bytes=200, host="host")
    places = (device("gpu0", host="host"), device("gpu1", host="host"), device("gpu2"), pair)
    times = ((100,) * 6, (55,) * 6)
    problem = even_problem(pieces=6, devices=0, stages=2, places=places, class_ns=times)
    found = solve(problem)
    assert {problem.places[stage.place].name for stage in found.stages} == {"pair", "gpu2"}
    assert found.scores.bottleneck_ns == 220
    assert found.optimal


def test_resident_ranks_keep_their_order_and_both_ends() -> None:
    places = tuple(device(f"rank{i}", free_bytes=100 - i) for i in range(4))
    found = solve(even_problem(pieces=6, devices=0, stages=3, places=places, fixed_order=True))
    chosen = [stage.place for stage in found.stages]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (0, 3)


def test_a_coarse_family_of_cuts_is_obeyed() -> None:
    problem = even_problem(pieces=8, devices=4, stages=2)
    coarse = merged(problem, (3, 6))
    found = solve(coarse)
    assert len(coarse.pieces) == 3
    assert found.scores.bottleneck_ns == 520
    assert solve(problem).scores.bottleneck_ns == 420


def test_an_earlier_answer_is_where_the_search_begins() -> None:
    problem = even_problem(pieces=8, devices=4, stages=3)
    first = solve(problem)
    again = place(problem, budget=Budget(limit_s=60.0, clock=time.monotonic), start=first.stages)
    assert again.scores == first.scores
    shrunk = replace(problem, places=(replace(problem.places[0], free_bytes=15), *problem.places[1:]))
    moved = place(shrunk, budget=Budget(limit_s=60.0, clock=time.monotonic), start=first.stages)
    assert moved.optimal
    assert check(shrunk, moved) == ()


def test_the_same_question_has_the_same_answer() -> None:
    assert len({solve(small_problem(7)) for _ in range(3)}) == 1


@pytest.mark.parametrize("aim", list(Aim))
def test_every_aim_has_a_proof(aim: Aim) -> None:
    found = solve(even_problem(pieces=4, devices=3, stages=2))
    proof = next(proof for proof in found.proofs if proof.aim is aim)
    assert (proof.proven, proof.gap) == (True, 0.0)
