"""The most even pipeline: which layers run on which device, by bytes alone.

Each rule and each aim is one method of ``_PipelineModel``; ``plan`` asks for one aim after the other, each within what
the aims before it reached. One worker and a fixed seed: a question answered in time always has the same answer.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import gcd

from planner.candidates import candidates, equal_candidates, kept_bytes, layer_bytes
from planner.errors import NoFeasiblePlan, PlanTimeout
from planner.layout import Pipeline, pipeline_of
from planner.moves import require_decoders
from planner.partition import (
    even_cuts,
    piece_bounds,
    stage_costs,
    stage_limit_sentence,
    unevenness,
    why_no_assignment,
    why_too_big,
)
from planner.plan import Plan, PlanRequest
from planner.solver import Linear, Model, Outcome, minimize
from topology.units import format_bytes


class _Allowance:
    """The seconds that may still go into solving. The solver's own clock tells what went: there is none here."""

    def __init__(self, seconds: float) -> None:
        self.left_s = seconds


def plan(request: PlanRequest) -> Plan:
    """Return the most even pipeline that fits, and among equals the one nearest to the layout in force.

    Aims, in this order: the smallest largest stage, the least uneven stages, the most bytes that stay where they are,
    the most cuts in common with the current layout, the earliest devices. Memory counts weights, KV capacity and
    workspace, and what the current layout still holds on a device during the handover. Without a number of stages, the
    fewest that fit are taken.

    Raises:
        NoFeasiblePlan: Proven: nothing fits; the message has the numbers.
        PlanTimeout: Nothing was found before the deadline, and nothing proven.
        InvalidLayout: The current layout is not one of this model.
    """
    if request.current is not None:
        require_decoders(request.current, request.graph)
    allowance = _Allowance(request.deadline_s)
    num_pieces = len(piece_bounds(request.graph)) - 1
    limit = min(num_pieces, len(request.devices))
    if limit < (request.num_stages or 1):
        raise NoFeasiblePlan(stage_limit_sentence(num_decoders=num_pieces, num_devices=len(request.devices)))
    if request.num_stages is not None:
        return _plan_stages(request, request.num_stages, allowance, why="as asked")
    why, refusal = "which is enough", ""
    for num_stages in range(1, limit + 1):
        try:
            return _plan_stages(request, num_stages, allowance, why=why)
        except NoFeasiblePlan as error:
            refusal = str(error)
            why = f"the fewest that fit ({_stages(num_stages)}: {refusal})"
    raise NoFeasiblePlan(refusal)


def _plan_stages(request: PlanRequest, num_stages: int, allowance: _Allowance, *, why: str) -> Plan:
    refusal = why_too_big(request, num_stages)
    if refusal:
        raise NoFeasiblePlan(refusal)
    model = _PipelineModel(request, num_stages)
    optimal = model.solve(allowance)
    pipeline, sizes = model.found()
    reasons = [f"{_stages(num_stages)}, {why}", _balance(pipeline, sizes)]
    if request.current is not None:
        kept, held = kept_bytes(request, pipeline)
        reasons.append(f"{format_bytes(kept)} of {format_bytes(held)} of weights and KV cache stay where they are")
    if not optimal:
        reasons.append(f"the best found in {request.deadline_s:g} s, not proven to be the best there is")
    return Plan(pipeline=pipeline, reasons=tuple(reasons), stage_bytes=sizes, optimal=optimal)


def _balance(pipeline: Pipeline, sizes: Sequence[int]) -> str:
    if len(sizes) == 1:
        return f"{format_bytes(sizes[0])} on {pipeline.device_ids[0]}"
    most, least = format_bytes(max(sizes)), format_bytes(min(sizes))
    if most == least:
        return f"{most} on each device"
    return f"at most {most} on a device ({pipeline.device_ids[sizes.index(max(sizes))]}), at least {least}"


def _stages(count: int) -> str:
    return "1 stage" if count == 1 else f"{count} stages"


class _PipelineModel:
    """One number of stages as a CP-SAT model. Bytes count in their greatest common divisor: exact, and smaller."""

    def __init__(self, request: PlanRequest, num_stages: int) -> None:
        self.request = request
        self.costs = stage_costs(request, num_stages)
        self.bounds = piece_bounds(request.graph)
        self.pieces = range(len(self.costs.pieces))
        self.stages = range(num_stages)
        self.devices = candidates(request, num_stages)
        self.unit = gcd(*self.costs.pieces, self.costs.first, self.costs.last, request.graph.shared_bytes) or 1
        self.units = [size // self.unit for size in self.costs.pieces]
        even = even_cuts(self.costs, num_stages)
        self.even = self.costs.bytes_of_cuts(even)  # no cuts have a smaller largest stage, whatever the devices
        self.cuts: tuple[int, ...] = ()  # of the best solution so far, in pieces
        self.chosen: tuple[int, ...] = ()  # its device for each stage

        self.model = Model()
        # upto[s][p]: piece p lies in stage s or in an earlier one
        self.upto = [[self.model.new_bool_var(f"upto_{s}_{p}") for p in self.pieces] for s in self.stages]
        self.on = [[self.model.new_bool_var(f"on_{s}_{d}") for d in range(len(self.devices))] for s in self.stages]
        self.kept = [[self._kept_units(s, d) for d in range(len(self.devices))] for s in self.stages]
        self._hint(even, ())
        self.add_contiguous_stages()
        self.add_one_device_per_stage()
        if request.fixed_order:
            self.add_fixed_order()
        else:
            self.add_order_of_equal_devices()
        self.add_memory_budget()

    # ---- rules

    def add_contiguous_stages(self) -> None:
        """Stages take the pieces in order, each at least one."""
        for s in self.stages:
            for p, q in pairwise(self.pieces):
                self.model.add_implication(self.upto[s][q], self.upto[s][p])
            if s > 0:
                for p in self.pieces:
                    self.model.add_implication(self.upto[s - 1][p], self.upto[s][p])
            self.model.add(sum(self._in_stage(s, p) for p in self.pieces) >= 1)
        self.model.add(self.upto[-1][-1] == 1)

    def add_one_device_per_stage(self) -> None:
        """Each stage has one device, and no two stages share one."""
        for row in self.on:
            self.model.add_exactly_one(row)
        for column in zip(*self.on, strict=True):
            self.model.add_at_most_one(column)

    def add_order_of_equal_devices(self) -> None:
        """Of devices that differ in nothing, earlier ones carry earlier stages (no plan is lost by this)."""
        for group in equal_candidates(self.devices):
            for d, after in pairwise(group):
                for s in self.stages:
                    self.model.add(self.on[s][after] <= sum(self.on[t][d] for t in range(s)))

    def add_fixed_order(self) -> None:
        """Stages follow the devices, from the first to the last."""
        places = [Linear.weighted_sum(row, range(len(row))) for row in self.on]
        for place, following in pairwise(places):
            self.model.add(place < following)
        self.model.add(places[0] == 0)
        self.model.add(places[-1] == len(self.devices) - 1)

    def add_memory_budget(self) -> None:
        """What a stage adds fits its device beside what the current layout holds there."""
        for d, candidate in enumerate(self.devices):
            room = (candidate.free_bytes - self.costs.fixed) // self.unit
            for s in self.stages:
                self.model.add(self._stage_units(s) - self.kept[s][d] <= room).only_enforce_if(self.on[s][d])

    # ---- aims, all to be minimised

    def aim_largest(self) -> Linear:
        """The bytes of the largest stage."""
        bound = (max(self.even) - self.costs.fixed) // self.unit
        largest = self.model.new_int_var(bound, self.costs.total_bytes // self.unit, "largest")
        for s in self.stages:
            self.model.add(largest >= self._stage_units(s))
        return largest

    def aim_unevenness(self) -> Linear:
        """How far the stages are from equal, as ``partition.unevenness`` counts."""
        count, total = len(self.stages), self.costs.total_bytes // self.unit
        far = [self.model.new_int_var(0, count * total, f"far_{s}") for s in self.stages]
        for s in self.stages:
            self.model.add(far[s] >= count * self._stage_units(s) - total)
            self.model.add(far[s] >= total - count * self._stage_units(s))
        if max(self.costs.bytes_of_cuts(self.cuts)) == max(self.even):  # then it is a bound here, too
            self.model.add(Linear.sum(far) >= unevenness(self.even) // self.unit)
        return Linear.sum(far)

    def aim_moved(self) -> Linear:
        """Bytes that do not stay where they are, less those of the whole model."""
        largest = max(self.costs.bytes_of_cuts(self.cuts)) // self.unit
        for kept_row, on_row in zip(self.kept, self.on, strict=True):  # implied, and spares the solver much search
            for kept, on in zip(kept_row, on_row, strict=True):
                self.model.add(kept <= largest * on)
        return -Linear.sum([kept for row in self.kept for kept in row])

    def aim_new_cuts(self) -> Linear:
        """Cuts of the current layout that are given up, less all of them: common cuts make later moves small."""
        firsts = [stage.first_decoder for stage in self.request.current.stages[1:]] if self.request.current else []
        cuts = [self.bounds.index(first) for first in firsts if first in self.bounds]
        return -Linear.sum([self.upto[s][p - 1] - self.upto[s][p] for p in cuts for s in self.stages])

    def aim_order(self) -> Linear:
        """Earlier devices for earlier stages, then more pieces in earlier stages: only to have one answer."""
        count = len(self.stages)
        order = Linear.sum([(count - s) * d * on for s, row in enumerate(self.on) for d, on in enumerate(row)])
        early = Linear.sum([upto for row in self.upto for upto in row])
        return order * (count * len(self.pieces) + 1) - early

    # ---- solving

    def solve(self, allowance: _Allowance) -> bool:
        """Find the best pipeline; return whether it is proven to be.

        Raises:
            NoFeasiblePlan, PlanTimeout
        """
        near = (self.aim_moved, self.aim_new_cuts) if self.request.current else ()
        for aim in (self.aim_largest, self.aim_unevenness, *near, self.aim_order):
            expression = aim()
            status, value = self._minimize(expression, allowance)
            if status == Outcome.INFEASIBLE:
                raise NoFeasiblePlan(why_no_assignment(self.request, len(self.stages)))
            if status == Outcome.UNKNOWN and not self.chosen:
                raise PlanTimeout(f"nothing found in {self.request.deadline_s:g} s for {len(self.stages)} stages")
            if status != Outcome.OPTIMAL:
                return False
            self.model.add(expression == value)
        return True

    def found(self) -> tuple[Pipeline, tuple[int, ...]]:
        """Return the best pipeline and the bytes of its stages."""
        pipeline = pipeline_of(
            device_ids=[self.devices[d].device.id for d in self.chosen],
            cuts=[self.bounds[cut] for cut in self.cuts],
            num_decoders=self.bounds[-1],
        )
        return pipeline, self.costs.bytes_of_cuts(self.cuts)

    def _minimize(self, aim: Linear, allowance: _Allowance) -> tuple[Outcome, int]:
        """Solve for one aim; keep what was found as the best so far and as the hint of the next."""
        if allowance.left_s <= 0:
            return Outcome.UNKNOWN, 0
        answer = minimize(self.model, aim, limit_s=allowance.left_s)
        allowance.left_s -= answer.took_s
        if not answer.found:
            return answer.outcome, 0
        self.cuts = tuple(sum(answer.value_of(taken) for taken in row) for row in self.upto[:-1])
        self.chosen = tuple(next(d for d, on in enumerate(row) if answer.value_of(on)) for row in self.on)
        self._hint(self.cuts, self.chosen)
        return answer.outcome, answer.value

    def _hint(self, cuts: Sequence[int], chosen: Sequence[int]) -> None:
        self.model.clear_hints()  # type: ignore[no-untyped-call]
        for row, cut in zip(self.upto, (*cuts, len(self.pieces)), strict=True):
            for p, upto in enumerate(row):
                self.model.add_hint(upto, p < cut)
        for row, device in zip(self.on, chosen, strict=False):
            for d, on in enumerate(row):
                self.model.add_hint(on, d == device)

    def _in_stage(self, s: int, p: int) -> Linear:
        return self.upto[s][p] - self.upto[s - 1][p] if s > 0 else 1 * self.upto[s][p]

    def _stage_units(self, s: int) -> Linear:
        ends = (self.costs.first if s == 0 else 0) + (self.costs.last if s == self.stages[-1] else 0)
        return Linear.weighted_sum([self._in_stage(s, p) for p in self.pieces], self.units) + ends // self.unit

    def _kept_units(self, s: int, d: int) -> Linear:
        """Bytes of stage ``s`` that are on device ``d`` already, if it is placed there, else 0."""
        graph, there = self.request.graph, self.devices[d].layers
        ends = [graph.embedding] * (s == 0) + [graph.head] * (s == self.stages[-1])
        stays = [self.on[s][d]]
        sizes = [layer_bytes([layer for layer in ends if layer in there], self.request)]
        for p, (first, end) in enumerate(pairwise(self.bounds)):
            present = [layer for layer in graph.decoders[first:end] if layer in there]
            if present:
                stay = self.model.new_bool_var(f"stays_{s}_{p}_{d}")
                self.model.add_implication(stay, self.on[s][d])
                self.model.add(stay <= self._in_stage(s, p))
                stays.append(stay)
                sizes.append(layer_bytes(present, self.request))
        return Linear.weighted_sum(stays, [size // self.unit for size in sizes])
