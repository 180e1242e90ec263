"""Answers one placement question after another where little changes in between, each from what the last one left.

Kept are the stages, by the names of their places, and what devices were worth. The old stages are repaired first. The
old prices are Lagrange multipliers like any others, so one pass over the new problem makes a bound of it from them.
"""

from dataclasses import dataclass

from planner.budget import Budget
from planner.placement import PlacedStage, Placement
from planner.placement_problem import PlacementProblem
from planner.placement_solver import Known, place_knowing


@dataclass(frozen=True, slots=True, kw_only=True)
class _NamedStage:
    place: str
    first: int
    end: int


class Replanner:
    """A session: ``place`` as ``placement_solver.place`` does, but sooner where the last problem was much the same."""

    def __init__(self) -> None:
        self._stages: tuple[_NamedStage, ...] = ()
        self._known = Known()

    def place(self, problem: PlacementProblem, *, budget: Budget) -> Placement:
        """Return the best placement found within the budget, with its bounds, and remember it for the next question.

        Raises:
            NoFeasiblePlan: Proven: nothing fits.
            PlanTimeout: Nothing was found in time. What the last answer left is kept.
        """
        found, self._known = place_knowing(problem, budget=budget, start=self._start(problem), known=self._known)
        self._stages = tuple(
            _NamedStage(place=problem.places[stage.place].name, first=stage.first, end=stage.end)
            for stage in found.stages
        )
        return found

    def _start(self, problem: PlacementProblem) -> tuple[PlacedStage, ...]:
        """Return the last stages; where a place is gone, on a number beyond all places, which is repaired."""
        numbers = {place.name: number for number, place in enumerate(problem.places)}
        gone = len(problem.places)
        return tuple(
            PlacedStage(place=numbers.get(stage.place, gone), first=stage.first, end=stage.end)
            for stage in self._stages
        )
