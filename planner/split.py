"""The best cuts for places in a given order: exact, by dynamic programming over (stage, last piece)."""

from collections.abc import Sequence

from planner.placement import PlacedStage
from planner.segments import SegmentCosts


def best_split(
    costs: SegmentCosts, order: Sequence[int], *, kv_tokens: int, limit_ns: int | None = None
) -> tuple[PlacedStage, ...] | None:
    """Return stages on ``order`` with the smallest bottleneck and KV cache for ``kv_tokens``.

    None where no cuts fit, or none stay within ``limit_ns``.
    """
    problem, count = costs.problem, len(costs.problem.pieces)
    best: dict[int, int] = {0: 0}  # bottleneck of the stages so far, by their end
    origins: list[dict[int, int]] = []
    for index, place in enumerate(order):
        hop = problem.hops.between(problem.places[order[index - 1]], problem.places[place]) if index else 0
        row = costs.times[problem.places[place].speed_class]
        left = len(order) - index - 1
        fits = costs.fits_until(place, kv_tokens) if len(order) > 1 else None  # a whole model may hold a table once
        found: dict[int, int] = {}
        origin: dict[int, int] = {}
        for first, so_far in best.items():
            ends = range(first + 1, count - left + 1) if left else (count,)
            for end in ends:
                if end > fits[first] if fits else costs.kv_tokens(place, first, end) < kv_tokens:
                    break
                worst = max(so_far, row[end] - row[first] + hop)
                if limit_ns is not None and worst > limit_ns:
                    break
                if end not in found or worst < found[end]:
                    found[end], origin[end] = worst, first
        best = found
        origins.append(origin)
    if count not in best:
        return None
    stages, end = [], count
    for place, origin in zip(reversed(order), reversed(origins), strict=True):
        stages.append(PlacedStage(place=place, first=origin[end], end=end))
        end = origin[end]
    return tuple(reversed(stages))
