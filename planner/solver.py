"""OR-Tools, as the planner uses it. The only module that imports it.

One worker and a fixed seed: a question answered in time always has the same answer. There is no clock here: CP-SAT
measures its own time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ortools.sat.python import cp_model

Model = cp_model.CpModel
Linear = cp_model.LinearExpr
Variable = cp_model.IntVar


class Outcome(Enum):
    """What a search came to. A time-out without a solution is ``UNKNOWN``: nothing is proven."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The end of a search: the best value, the bound below it, and the values of the variables."""

    outcome: Outcome
    took_s: float
    value: int = 0
    bound: int | None = None  # None: nothing is known
    value_of: Callable[[Variable | Linear], int] = lambda _: 0

    @property
    def found(self) -> bool:
        return self.outcome in (Outcome.OPTIMAL, Outcome.FEASIBLE)


def minimize(model: Model, aim: Linear | Variable, *, limit_s: float, linear: bool = False) -> Answer:
    """Search for the least value of ``aim``. ``linear`` asks for the full linear relaxation of each rule."""
    if limit_s <= 0:
        return Answer(outcome=Outcome.UNKNOWN, took_s=0.0)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.catch_sigint_signal = False  # else it takes SIGINT from the daemon, and never gives it back
    solver.parameters.random_seed = 0
    solver.parameters.cp_model_probing_level = 0  # both cost more than they bring with models as small as these
    solver.parameters.symmetry_level = 0
    solver.parameters.max_time_in_seconds = limit_s
    if linear:
        solver.parameters.linearization_level = 2
    model.minimize(aim)
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return Answer(outcome=Outcome.INFEASIBLE, took_s=solver.wall_time)
    bound = round(solver.best_objective_bound)  # of integers, so whole but for rounding
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(outcome=Outcome.UNKNOWN, took_s=solver.wall_time, bound=bound)
    return Answer(
        outcome=Outcome.OPTIMAL if status == cp_model.OPTIMAL else Outcome.FEASIBLE,
        took_s=solver.wall_time,
        value=solver.value(aim),
        bound=bound,
        value_of=solver.value,
    )
