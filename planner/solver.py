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
    """The cheapest flow: how much passes each arc, and the shadow prices of the limits, none below 0."""

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
    return Flow(amounts=amounts[:count], prices=prices)


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
    """Look for a flow that takes whole arcs, at most ``most`` counted ones, within the limits."""
    model = cp_model.CpModel()
    takes = [model.new_bool_var("") for _ in arcs.tails]
    balance: dict[int, list[tuple[Variable, int]]] = {}
    draws: dict[int, list[tuple[Variable, int]]] = {}
    for take, tail, head, use in zip(takes, arcs.tails.tolist(), arcs.heads.tolist(), arcs.uses.tolist(), strict=True):
        balance.setdefault(tail, []).append((take, 1))
        balance.setdefault(head, []).append((take, -1))
        for limit, amount in _draws(arcs, use):
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
