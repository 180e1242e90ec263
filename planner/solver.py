"""OR-Tools, as the planner uses it. The only module that imports it.

One worker and a fixed seed: a question answered in time always has the same answer. There is no clock here: CP-SAT
measures its own time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver import pywraplp
from ortools.sat.python import cp_model

Model = cp_model.CpModel
Linear = cp_model.LinearExpr
Variable = cp_model.IntVar

_EXCESS_PRICE = 4.0  # of a limit exceeded by one, in counted arcs


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowArcs:
    """A unit of flow from ``source`` to ``sink``; an arc with a use counts one and consumes what that use takes."""

    tails: NDArray[np.int64]
    heads: NDArray[np.int64]
    uses: NDArray[np.int64]  # -1: the arc is free
    consumption: Sequence[Sequence[tuple[int, float]]]  # by use: which limits it draws on, and how much
    source: int
    sink: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """The cheapest flow: how much passes each arc, and the shadow prices of the limits, none below 0."""

    amounts: NDArray[np.float64]
    prices: NDArray[np.float64]


def cheapest_flow(arcs: FlowArcs, *, limits: NDArray[np.float64]) -> Flow | None:
    """Return the flow with the fewest counted arcs, None where there is none.

    A linear program, in GLOP. Limits may be exceeded at a price that no flow within them would pay.
    """
    solver: Any = pywraplp.Solver("flow", pywraplp.Solver.GLOP_LINEAR_PROGRAMMING)  # its stubs have no types
    infinity = solver.infinity()
    flow = {node: solver.Constraint(0.0, 0.0) for node in np.union1d(arcs.tails, arcs.heads).tolist()}
    if arcs.source not in flow or arcs.sink not in flow:
        return None
    flow[arcs.source].SetBounds(1.0, 1.0)
    flow[arcs.sink].SetBounds(-1.0, -1.0)
    objective = solver.Objective()
    objective.SetMinimization()
    rows = {}
    for limit in sorted({limit for use in set(arcs.uses.tolist()) - {-1} for limit, _ in arcs.consumption[use]}):
        rows[limit] = solver.Constraint(-infinity, float(limits[limit]))
        excess = solver.NumVar(0.0, infinity, "")
        rows[limit].SetCoefficient(excess, -1.0)
        objective.SetCoefficient(excess, _EXCESS_PRICE)
    variables = []
    for tail, head, use in zip(arcs.tails.tolist(), arcs.heads.tolist(), arcs.uses.tolist(), strict=True):
        variable = solver.NumVar(0.0, infinity, "")
        variables.append(variable)
        flow[tail].SetCoefficient(variable, 1.0)
        flow[head].SetCoefficient(variable, -1.0)
        if use >= 0:
            objective.SetCoefficient(variable, 1.0)
            for limit, amount in arcs.consumption[use]:
                rows[limit].SetCoefficient(variable, amount)
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        return None
    prices = np.zeros(len(limits))
    for limit, row in rows.items():
        prices[limit] = max(0.0, -row.dual_value())
    return Flow(amounts=np.asarray([variable.solution_value() for variable in variables]), prices=prices)


def whole_flow(
    arcs: FlowArcs, *, limits: NDArray[np.float64], most: int, limit_s: float
) -> tuple[Outcome, NDArray[np.float64]]:
    """Look for a flow that takes whole arcs, at most ``most`` counted ones, within the limits."""
    model = cp_model.CpModel()
    takes = [model.new_bool_var("") for _ in arcs.tails]
    balance: dict[int, list[tuple[Variable, int]]] = {}
    draws: dict[int, list[tuple[Variable, int]]] = {}
    for take, tail, head, use in zip(takes, arcs.tails.tolist(), arcs.heads.tolist(), arcs.uses.tolist(), strict=True):
        balance.setdefault(tail, []).append((take, 1))
        balance.setdefault(head, []).append((take, -1))
        for limit, amount in arcs.consumption[use] if use >= 0 else ():
            draws.setdefault(limit, []).append((take, round(amount)))
    for node, terms in balance.items():
        net = (node == arcs.source) - (node == arcs.sink)
        model.add(Linear.weighted_sum([take for take, _ in terms], [sign for _, sign in terms]) == net)
    for limit, terms in draws.items():
        if sum(amount for _, amount in terms) > limits[limit]:
            amounts = [amount for _, amount in terms]
            model.add(Linear.weighted_sum([take for take, _ in terms], amounts) <= round(limits[limit]))
    counted = [take for take, use in zip(takes, arcs.uses.tolist(), strict=True) if use >= 0]
    model.add(Linear.sum(counted) <= most)
    answer = minimize(model, Linear.sum([]), limit_s=limit_s)
    taken = [answer.value_of(take) for take in takes] if answer.found else []
    return answer.outcome, np.asarray(taken, dtype=np.float64)
