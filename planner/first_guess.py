"""Stages to begin a search with: found in a moment, so that even a machine that is busy has an answer in time."""

from collections.abc import Iterator, Sequence

from planner.checker import check_stages
from planner.placement import PlacedStage
from planner.placement_problem import PlacementProblem
from planner.segments import SegmentCosts
from planner.split import best_split
from planner.start import usable_start


def first_guess(problem: PlacementProblem, in_force: Sequence[PlacedStage] = ()) -> tuple[PlacedStage, ...]:
    """Return stages that keep the rules; nothing where none of a few guesses does.

    1. The layout in force, where it has as many stages; where it keeps the rules no more, with other cuts or one place
       replaced.
    2. The best cuts for some order of places: of resident ranks those evenly spread, or the first ones and the last.
    """
    costs = SegmentCosts(problem)
    if len(in_force) == problem.num_stages and (kept := usable_start(problem, in_force, costs)):  # 1
        return kept
    for order in _orders(problem):  # 2
        found = best_split(costs, order, kv_tokens=problem.min_kv_tokens)
        if found is not None and not check_stages(problem, found):
            return found
    return ()


def _orders(problem: PlacementProblem) -> Iterator[list[int]]:
    last, count = len(problem.places) - 1, problem.num_stages
    if count > last + 1:
        return
    if problem.fixed_order:
        spread = sorted({round(index * last / max(1, count - 1)) for index in range(count)})
        yield spread if len(spread) == count else list(range(count))
        yield [*range(count - 1), last]
        return
    roomiest = sorted(range(last + 1), key=lambda place: -problem.places[place].room_bytes)
    yield sorted(roomiest[:count])
