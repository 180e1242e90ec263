"""Stages to begin a search with, from an earlier answer to a question that was much the same."""

from collections.abc import Sequence

from planner.checker import check_stages
from planner.placement import PlacedStage, score
from planner.placement_problem import PlacementProblem
from planner.segments import SegmentCosts
from planner.split import best_split

_REPAIRS = 6  # places that are tried in the place of one that went
_EASED = (1.02, 1.1, 1.3, 2.0, 4.0)  # times the old bottleneck, where cuts are looked for, the smallest first


def usable_start(
    problem: PlacementProblem, start: Sequence[PlacedStage], costs: SegmentCosts | None = None
) -> tuple[PlacedStage, ...]:
    """Return the stages where they keep the rules, else the best cuts for their places, or with one place replaced.

    A place that is gone has a number beyond all places.
    """
    if not start or not check_stages(problem, start):
        return tuple(start)
    costs, places = costs or SegmentCosts(problem), problem.places
    last = start[-1].end
    if len(start) != problem.num_stages or last != len(problem.pieces):
        return ()
    broken = [
        index
        for index, stage in enumerate(start)
        if stage.place >= len(places) or costs.kv_tokens(stage.place, stage.first, stage.end) < problem.min_kv_tokens
    ]
    order = [stage.place for stage in start]
    kept = [at for at in order if at < len(places)]
    used = {device for at in kept for device in places[at].device_ids}
    spare = [at for at, found in enumerate(places) if used.isdisjoint(found.device_ids)]
    fastest = sorted(spare, key=lambda at: (costs.times[places[at].speed_class][-1], -places[at].room_bytes))
    orders = [] if len(kept) < len(order) else [order]
    for index in broken:
        tried = [[*order[:index], other, *order[index + 1 :]] for other in _varied(problem, fastest)]
        orders += [found for found in tried if max(found) < len(places)]
    limits_ns = _limits_ns(problem, start, costs)
    best: tuple[PlacedStage, ...] = ()
    for limit_ns in limits_ns:
        for tried_order in orders:
            found = best_split(costs, tried_order, kv_tokens=problem.min_kv_tokens, limit_ns=limit_ns)
            if found is not None and not check_stages(problem, found):
                best, limit_ns = found, score(problem, found).bottleneck_ns - 1
        if best:
            break
    return best


def _varied(problem: PlacementProblem, fastest: Sequence[int]) -> list[int]:
    """Return spare places to try: two of each speed class, so that not all are of the fastest with no room."""
    by_class: dict[int, list[int]] = {}
    for at in fastest:
        by_class.setdefault(problem.places[at].speed_class, []).append(at)
    return [at for found in by_class.values() for at in found[:2]][:_REPAIRS]


def _limits_ns(problem: PlacementProblem, start: Sequence[PlacedStage], costs: SegmentCosts) -> list[int | None]:
    """Return the limits within which cuts are sought; a tight one is quick to search."""
    there = [stage for stage in start if stage.place < len(problem.places)]
    slowest = max((costs.time_ns(stage.place, stage.first, stage.end) for stage in there), default=0)
    hop = problem.hops.network_ns
    return [*(round((slowest + hop) * ease) for ease in _EASED), None] if there else [None]
