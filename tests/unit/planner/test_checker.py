"""The checker says of every broken plan what is wrong with it."""

import time
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.budget import Budget
from planner.checker import check, check_stages
from planner.errors import NoFeasiblePlan
from planner.placement import PlacedStage, Placement
from planner.placement_problem import Hops, Piece, Place, PlacementProblem
from planner.placement_solver import place
from tests.support.placements import small_problem

PROBLEM = PlacementProblem(
    pieces=(Piece(weight_bytes=10, kv_bytes_per_token=1),) * 6,
    class_ns=((100,) * 6, (50,) * 6),
    places=(
        *(
            Place(name=f"g{i}", device_ids=(f"g{i}",), speed_class=0, free_bytes=60, host=f"h{i // 2}")
            for i in range(4)
        ),
        Place(name="pair", device_ids=("g0", "g1"), speed_class=1, free_bytes=120, host="h0"),
    ),
    num_stages=2,
    hops=Hops(network_ns=20, same_host_ns={"h0": 5}),
    min_kv_tokens=4,
)


def solve(problem: PlacementProblem) -> Placement:
    return place(problem, budget=Budget(limit_s=60.0, clock=time.monotonic))


def stages(*wanted: tuple[int, int, int]) -> tuple[PlacedStage, ...]:
    return tuple(PlacedStage(place=where, first=first, end=end) for where, first, end in wanted)


def test_a_good_plan_breaks_nothing() -> None:
    assert check(PROBLEM, solve(PROBLEM)) == ()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (stages((0, 0, 6)), "2 stages were asked for, not 1"),
        (stages((0, 0, 3), (9, 3, 6)), "stage 1 is on place 9, of 5 places"),
        (stages((0, 0, 3), (1, 4, 6)), "stage 1 begins at piece 4, not at piece 3"),
        (stages((0, 0, 3), (1, 3, 3)), "stage 1 holds no piece"),
        (stages((0, 0, 3), (1, 3, 5)), "the stages end at piece 5, of 6"),
        (stages((0, 0, 5), (1, 5, 6)), "stage 0 needs 70 B with KV cache for 4 tokens, g0 offers 60 B"),
        (stages((0, 0, 3), (0, 3, 6)), "2 stages share device g0"),
        (stages((0, 0, 3), (4, 3, 6)), "2 stages share device g0"),
    ],
)
def test_each_rule_has_its_sentence(wrong: tuple[PlacedStage, ...], sentence: str) -> None:
    assert sentence in check_stages(PROBLEM, wrong)


@pytest.mark.parametrize("devices", [("g1", "g2"), ("g0", "g0"), ()])
def test_a_group_that_is_not_of_one_island_is_refused(devices: tuple[str, ...]) -> None:
    torn = Place(name="torn", device_ids=devices, speed_class=1, free_bytes=120, host="h0")
    with pytest.raises(ValueError, match="the devices of torn are not distinct devices of one island"):
        replace(PROBLEM, places=(*PROBLEM.places, torn))


def test_order_and_latency_are_rules_where_they_are_asked_for() -> None:
    ordered = replace(PROBLEM, places=PROBLEM.places[:4], fixed_order=True)
    assert check_stages(ordered, stages((1, 0, 3), (0, 3, 6))) == (
        "stages do not follow the order of the places",
        "the first and the last place must carry the first and the last stage",
    )
    hurried = replace(PROBLEM, latency_limit_ns=600)
    assert check_stages(hurried, stages((0, 0, 3), (2, 3, 6))) == ("a step takes 0.00062 ms, 0.0006 ms are allowed",)


@pytest.mark.parametrize(
    "figure", ["bottleneck_ns", "kv_tokens", "change_ns", "fragmentation", "moved_bytes", "latency_ns"]
)
def test_every_figure_is_recomputed(figure: str) -> None:
    good = solve(PROBLEM)
    for step in (-1, 1):
        wrong = replace(good, scores=replace(good.scores, **{figure: getattr(good.scores, figure) + step}))
        assert check(PROBLEM, wrong) != ()


def test_a_bound_that_is_bettered_is_no_bound() -> None:
    good = solve(PROBLEM)
    proofs = (replace(good.proofs[0], bound=good.scores.bottleneck_ns + 1), *good.proofs[1:])
    assert check(PROBLEM, replace(good, proofs=proofs))[0].startswith("bottleneck is")


@settings(max_examples=60, deadline=None)
@given(st.integers(min_value=0, max_value=10_000_000), st.data())
def test_a_plan_with_one_thing_changed_is_refused_or_no_better(seed: int, data: st.DataObject) -> None:
    """A changed stage either breaks a rule, or does not agree with the figures, or scores just the same."""
    problem = small_problem(seed)
    try:
        good = solve(problem)
    except NoFeasiblePlan:
        assume(False)
        return
    at = data.draw(st.integers(min_value=0, max_value=len(good.stages) - 1))
    stage = good.stages[at]
    field = data.draw(st.sampled_from(["place", "first", "end"]))
    changed = replace(stage, **{field: getattr(stage, field) + data.draw(st.sampled_from([-1, 1]))})
    wrong = replace(good, stages=(*good.stages[:at], changed, *good.stages[at + 1 :]))
    if field != "place":
        assert check(problem, wrong) != ()
    elif check(problem, wrong) == ():
        assert wrong.scores == good.scores
