"""Answers one placement question after another where little changes in between, each from what the last one left.

Kept are the stages, by the names of their places, and what devices were worth. The old stages are repaired first. The
old prices are Lagrange multipliers like any others, so one pass over the new problem makes a bound of it from them.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

from planner.budget import Budget
from planner.errors import PlanTimeout
from planner.placement import PlacedStage, Placement
from planner.placement_problem import PlacementProblem
from planner.placement_solver import Known, place_knowing

QUICK_S: Final = 0.08  # for an answer from what is known within 0.1 s: the step that is under way ends later


@dataclass(frozen=True, slots=True, kw_only=True)
class _NamedStage:
    place: str
    first: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Left:
    """What an answer left: one value, so that a plan in another thread sees all of it or none."""

    stages: tuple[_NamedStage, ...]
    known: Known


class Replanner:
    """A session: ``place`` as ``placement_solver.place`` does, but sooner where the last problem was much the same."""

    def __init__(self) -> None:
        self._left: _Left | None = None

    def place(self, problem: PlacementProblem, *, budget: Budget, start: Sequence[PlacedStage] = ()) -> Placement:
        """Return the best placement found within the budget, with its bounds, and remember it for the next question.

        1. From what is known, in a moment.
        2. Where that is not proven and time is left, by a search that knows nothing but those stages: known prices
           are the quicker way to a good answer, but not to the best.

        Args:
            start: Stages to begin with where nothing is known.

        Raises:
            NoFeasiblePlan: Proven: nothing fits.
            PlanTimeout: Nothing was found in time. What the last answer left is kept.
        """
        left = self._left
        if left is None:
            found, known = place_knowing(problem, budget=budget, start=start, known=Known())
        else:
            found, known = self._from_known(problem, budget, start, left)
        self._left = _Left(stages=_named(problem, found.stages), known=known)
        return found

    def _from_known(
        self, problem: PlacementProblem, budget: Budget, start: Sequence[PlacedStage], left: _Left
    ) -> tuple[Placement, Known]:
        try:
            quick = place_knowing(
                problem, budget=budget.at_most(QUICK_S), start=_numbered(problem, left.stages), known=left.known
            )
        except PlanTimeout:
            if budget.is_spent():
                raise
            return place_knowing(problem, budget=budget, start=start, known=Known())
        if quick[0].optimal or budget.is_spent():
            return quick
        return place_knowing(problem, budget=budget, start=quick[0].stages, known=Known())


class PlanSession:
    """A replanner for each question that plans ask again and again, such as one number of stages."""

    def __init__(self) -> None:
        self._replanners: dict[Hashable, Replanner] = {}

    def replanner(self, key: Hashable) -> Replanner:
        """Return that of a question; a new one the first time. May be called from any thread."""
        return self._replanners.setdefault(key, Replanner())


def _named(problem: PlacementProblem, stages: Sequence[PlacedStage]) -> tuple[_NamedStage, ...]:
    return tuple(
        _NamedStage(place=problem.places[stage.place].name, first=stage.first, end=stage.end) for stage in stages
    )


def _numbered(problem: PlacementProblem, stages: Sequence[_NamedStage]) -> tuple[PlacedStage, ...]:
    """Return the stages by number; where a place is gone, on a number beyond all places, which is repaired."""
    numbers = {place.name: number for number, place in enumerate(problem.places)}
    gone = len(problem.places)
    return tuple(
        PlacedStage(place=numbers.get(stage.place, gone), first=stage.first, end=stage.end) for stage in stages
    )
