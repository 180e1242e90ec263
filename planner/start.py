"""Stages to begin a search with, from an earlier answer to a question that was much the same."""

from collections.abc import Sequence

from planner.checker import check_stages
from planner.placement import PlacedStage, score
from planner.placement_problem import PlacementProblem
from planner.segments import SegmentCosts
from planner.split import best_split

_REPAIRS = 8  # places that are tried in the place of one that went


def usable_start(problem: PlacementProblem, start: Sequence[PlacedStage]) -> tuple[PlacedStage, ...]:
    """Return the stages where they keep the rules, else the best cuts for their places, or with one place replaced."""
    if not start or not check_stages(problem, start):
        return tuple(start)
    costs, places = SegmentCosts(problem), problem.places
    if len(start) != problem.num_stages or any(stage.place >= len(places) for stage in start):
        return ()
    order = [stage.place for stage in start]
    orders = [order]
    used = {device for at in order for device in places[at].device_ids}
    spare = [at for at, found in enumerate(places) if used.isdisjoint(found.device_ids)]
    fastest = sorted(spare, key=lambda at: (costs.times[places[at].speed_class][-1], -places[at].room_bytes))
    for index, stage in enumerate(start):
        if costs.kv_tokens(stage.place, stage.first, stage.end) < problem.min_kv_tokens:
            orders += [[*order[:index], other, *order[index + 1 :]] for other in fastest[:_REPAIRS]]
    best: tuple[PlacedStage, ...] = ()
    limit_ns = None
    for tried in orders:
        found = best_split(costs, tried, kv_tokens=problem.min_kv_tokens, limit_ns=limit_ns)
        if found is not None and not check_stages(problem, found):
            best, limit_ns = found, score(problem, found).bottleneck_ns - 1
    return best
