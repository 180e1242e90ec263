"""OR-Tools, as the planner uses it. The only module that imports it.

One worker and a fixed seed: a question answered in time always has the same answer. There is no clock here: CP-SAT
measures its own time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver import linear_solver_pb2, pywraplp
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
    """The cheapest flow: what it costs, how much passes each arc, and the prices of the limits, none below 0."""

    cost: float
    amounts: NDArray[np.float64]
    prices: NDArray[np.float64]


def cheapest_flow(arcs: FlowArcs, *, limits: NDArray[np.float64]) -> Flow | None:
    """Return the flow with the fewest counted arcs, None where there is none.

    A linear program, in GLOP. Limits may be exceeded at a price that no flow within them would pay.
    """
    nodes, places = np.unique(np.concatenate([arcs.tails, arcs.heads]), return_inverse=True)
    ends = np.flatnonzero(nodes == arcs.source), np.flatnonzero(nodes == arcs.sink)
    if not (len(ends[0]) and len(ends[1])):
        return None
    count = len(arcs.tails)
    drawn = [(limit, arc, amount) for arc, use in enumerate(arcs.uses.tolist()) for limit, amount in _draws(arcs, use)]
    limited = sorted({limit for limit, _, _ in drawn})
    number = {limit: len(nodes) + at for at, limit in enumerate(limited)}
    rows = np.concatenate([places, [number[limit] for limit, _, _ in drawn], list(number.values())]).astype(np.int64)
    columns = np.concatenate(
        [np.tile(np.arange(count), 2), [arc for _, arc, _ in drawn], count + np.arange(len(number))]
    )
    values = np.concatenate([np.ones(count), -np.ones(count), [amount for *_, amount in drawn], -np.ones(len(number))])
    lower, upper = np.zeros(len(nodes) + len(number)), np.zeros(len(nodes) + len(number))
    lower[ends[0]] = upper[ends[0]] = 1.0
    lower[ends[1]] = upper[ends[1]] = -1.0
    lower[len(nodes) :], upper[len(nodes) :] = -np.inf, limits[limited]
    costs = np.concatenate([(arcs.uses >= 0).astype(np.float64), np.full(len(number), _EXCESS_PRICE)])
    answer = _linear_program(costs=costs, rows=rows, columns=columns, values=values, lower=lower, upper=upper)
    if answer is None:
        return None
    amounts, duals = answer
    prices = np.zeros(len(limits))
    prices[limited] = np.maximum(0.0, -duals[len(nodes) :])
    return Flow(cost=float(costs @ amounts), amounts=amounts[:count], prices=prices)


def _draws(arcs: FlowArcs, use: int) -> Sequence[tuple[int, float]]:
    return arcs.consumption[use] if use >= 0 else ()


def _linear_program(
    *,
    costs: NDArray[np.float64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    values: NDArray[np.float64],
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the variables (0 or more each) of least cost and the duals of the rows; None without a solution."""
    proto: Any = linear_solver_pb2.MPModelProto()
    for cost in costs.tolist():
        proto.variable.add(lower_bound=0.0, upper_bound=np.inf, objective_coefficient=cost)
    order = np.argsort(rows, kind="stable")
    starts = np.searchsorted(rows[order], np.arange(len(lower) + 1)).tolist()
    column_list, value_list = columns[order].tolist(), values[order].tolist()
    for row, (first, end) in enumerate(pairwise(starts)):
        proto.constraint.add(
            lower_bound=lower[row],
            upper_bound=upper[row],
            var_index=column_list[first:end],
            coefficient=value_list[first:end],
        )
    solver: Any = pywraplp.Solver("flow", pywraplp.Solver.GLOP_LINEAR_PROGRAMMING)  # its stubs have no types
    solver.LoadModelFromProto(proto)
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        return None
    response: Any = linear_solver_pb2.MPSolutionResponse()
    solver.FillSolutionResponseProto(response)
    return np.asarray(response.variable_value), np.asarray(response.dual_value)


def whole_flow(
    arcs: FlowArcs, *, limits: NDArray[np.float64], most: int, limit_s: float
) -> tuple[Outcome, NDArray[np.float64]]:
    """Look for a flow that takes whole arcs, at most ``most`` counted ones, within the limits.

    With SCIP: branching on the linear program proves in tenths of a second what CP-SAT does not prove in ten.
    """
    solver: Any = pywraplp.Solver("whole", pywraplp.Solver.SCIP_MIXED_INTEGER_PROGRAMMING)
    solver.SetSolverSpecificParametersAsString(
        "misc/catchctrlc=FALSE\n"  # as for CP-SAT
        "presolving/maxrounds=0\n"  # a flow has little to presolve: with it these take up to ten times as long
    )
    solver.LoadModelFromProto(_whole_model(arcs, limits=limits, most=most))
    solver.SetNumThreads(1)
    solver.SetTimeLimit(max(1, int(limit_s * 1000)))
    match solver.Solve():
        case pywraplp.Solver.INFEASIBLE:
            return Outcome.INFEASIBLE, np.zeros(0)
        case pywraplp.Solver.OPTIMAL | pywraplp.Solver.FEASIBLE:
            response: Any = linear_solver_pb2.MPSolutionResponse()
            solver.FillSolutionResponseProto(response)
            return Outcome.FEASIBLE, np.round(np.asarray(response.variable_value))
        case _:
            return Outcome.UNKNOWN, np.zeros(0)


def _whole_model(arcs: FlowArcs, *, limits: NDArray[np.float64], most: int) -> Any:
    """Return the model of ``whole_flow``: what enters a node leaves it, and nothing is drawn beyond its limit."""
    proto: Any = linear_solver_pb2.MPModelProto()
    balance: dict[int, list[tuple[int, float]]] = {}
    draws: dict[int, list[tuple[int, float]]] = {}
    for arc, (tail, head, use) in enumerate(
        zip(arcs.tails.tolist(), arcs.heads.tolist(), arcs.uses.tolist(), strict=True)
    ):
        proto.variable.add(lower_bound=0.0, upper_bound=1.0, is_integer=True)
        balance.setdefault(tail, []).append((arc, 1.0))
        balance.setdefault(head, []).append((arc, -1.0))
        for limit, amount in _draws(arcs, use):
            draws.setdefault(limit, []).append((arc, amount))

    def add(terms: Sequence[tuple[int, float]], lower: float, upper: float) -> None:
        proto.constraint.add(
            lower_bound=lower,
            upper_bound=upper,
            var_index=[arc for arc, _ in terms],
            coefficient=[amount for _, amount in terms],
        )

    for node, terms in balance.items():
        net = float(node == arcs.source) - float(node == arcs.sink)
        add(terms, net, net)
    for limit, terms in draws.items():
        if sum(amount for _, amount in terms) > limits[limit]:
            add(terms, -np.inf, float(limits[limit]))
    add([(arc, 1.0) for arc, use in enumerate(arcs.uses.tolist()) if use >= 0], 0.0, float(most))
    return proto
