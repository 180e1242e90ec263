"""From a question of the planner to a placement problem, and from its placement back to a pipeline."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

from planner.budget import Budget
from planner.candidate_plan import StageMemory
from planner.canonical import in_order
from planner.checker import check, check_stages
from planner.errors import BrokenPlan, NoFeasiblePlan, PlanTimeout
from planner.first_guess import first_guess
from planner.layer_costs import Batch
from planner.layout import Pipeline, Stage
from planner.model_graph import Layer, ModelGraph
from planner.placement import PlacedStage, Placement, stage_kv_tokens
from planner.placement_problem import KV_UNLIMITED, Piece, PlacementProblem, merged
from planner.places import Places
from planner.question import PlanQuestion
from planner.replanner import Replanner
from planner.stage_times import DeviceGroups, ReferenceStep, reference_step

_NS = 1e9
_LIMITED_SHARE = 0.8  # of the time, for a placement that keeps the limit on a step's time


@dataclass(frozen=True, slots=True, kw_only=True)
class Posed:
    """A placement problem with what is needed to read its placements."""

    question: PlanQuestion
    problem: PlacementProblem
    degree: int
    bounds: tuple[int, ...]  # the first decoder of each piece, and the end

    def without(self, device_ids: Collection[str]) -> "Posed":
        """Return the problem on the places that use none of these devices."""
        used = set(device_ids)
        left = tuple(place for place in self.problem.places if used.isdisjoint(place.device_ids))
        return replace(self, problem=replace(self.problem, places=left))

    def with_cuts(self, cuts: Sequence[int]) -> "Posed":
        """Return the problem with only these cuts left, of the model's pieces."""
        bounds = tuple(self.bounds[cut] for cut in (0, *cuts, len(self.problem.pieces)))
        return replace(self, problem=merged(self.problem, cuts), bounds=bounds)

    def solve(self, budget: Budget, replanner: Replanner | None = None) -> Placement:
        """Return the best placement. Where no step is found that is as fast as the targets ask, that limit is left out.

        Args:
            replanner: Knows earlier answers to much the same question, and remembers this one.

        Raises:
            NoFeasiblePlan, PlanTimeout
        """
        stages, places = self.problem.num_stages, self.problem.places
        devices = {device for place in places for device in place.device_ids}
        apart = min(len(places), len(devices) // self.degree)  # groups that share no device
        if apart < stages:
            raise NoFeasiblePlan(_too_few(apart, degree=self.degree, num_stages=stages))
        if self.problem.latency_limit_ns is not None:
            with suppress(NoFeasiblePlan, PlanTimeout):
                return self._placed(self.problem, budget.part(_LIMITED_SHARE), replanner)
        return self._placed(replace(self.problem, latency_limit_ns=None), budget, replanner)

    def _placed(self, problem: PlacementProblem, budget: Budget, replanner: Replanner | None) -> Placement:
        """Return the solver's placement, put in order, after the rules have been held against it."""
        start = first_guess(problem, self._in_force())
        found = (replanner or Replanner()).place(problem, budget=budget, start=start)
        placement = replace(found, stages=in_order(problem, found.stages))
        if broken := check(problem, placement):
            raise BrokenPlan(f"the plan breaks a rule and is not used: {'; '.join(broken)}")
        return placement

    def _in_force(self) -> tuple[PlacedStage, ...]:
        """Return the stages in force as stages of this problem; nothing where their cuts are not in it.

        A place that is gone has a number beyond all places.
        """
        current = self.question.current
        if current is None or not self.question.shares_current:
            return ()
        return self.placed_stages(current) or ()

    def placed_stages(self, pipeline: Pipeline) -> tuple[PlacedStage, ...] | None:
        """Return the stages of a pipeline by places and pieces; None where one of them begins or ends in no piece.

        What is no place here has a number beyond all places.
        """
        gone = len(self.problem.places)
        positions = {frozenset(place.device_ids): position for position, place in enumerate(self.problem.places)}
        starts = {decoder: piece for piece, decoder in enumerate(self.bounds)}
        found = [
            (
                positions.get(frozenset(stage.device_ids), gone),
                starts.get(stage.first_decoder),
                starts.get(stage.end_decoder),
            )
            for stage in pipeline.stages
        ]
        stages = [
            PlacedStage(place=place, first=first, end=end)
            for place, first, end in found
            if first is not None and end is not None
        ]
        return tuple(stages) if len(stages) == len(found) else None

    def pipeline(self, placement: Placement) -> Pipeline:
        """Return the pipeline that a placement means."""
        return Pipeline(
            stages=tuple(
                Stage(
                    device_ids=self.problem.places[stage.place].device_ids,
                    first_decoder=self.bounds[stage.first],
                    end_decoder=self.bounds[stage.end],
                )
                for stage in placement.stages
            )
        )

    def kv_tokens(self, placement: Placement) -> int:
        """Return the KV capacity that the plan has: as configured, or of the smallest stage, as far as it is of use."""
        if self.question.engine.kv_per_device is not None:
            return self.question.engine.kv_per_device.tokens(self.question.graph, self.pipeline(placement))
        return min(stage_kv_tokens(self.problem, stage) for stage in placement.stages)

    def memory(self, placement: Placement, *, kv_tokens: int) -> tuple[StageMemory, ...]:
        """Return what each stage takes on each of its devices."""
        usable = {device.id: device.memory_usable_bytes for device in self.question.topology.devices}
        found = []
        for stage in placement.stages:
            place = self.problem.places[stage.place]
            degree = len(place.device_ids)
            pieces = self.problem.pieces[stage.first : stage.end]
            whole = len(pieces) == len(self.problem.pieces)
            weights = sum(piece.weight_bytes for piece in pieces) - (self.problem.tied_bytes if whole else 0)
            weights += self.question.graph.copied_bytes
            kv = kv_tokens * sum(piece.kv_bytes_per_token for piece in pieces)
            found.append(
                StageMemory(
                    device_ids=place.device_ids,
                    weight_bytes=-(-weights // degree),
                    kv_bytes=-(-kv // degree),
                    workspace_bytes=_workspace_bytes(self.question) // degree,
                    usable_bytes=min(usable[device] for device in place.device_ids),
                    kv_budget_bytes=self.question.engine.kv_device_bytes or None,
                )
            )
        return tuple(found)


def check_pipeline(question: PlanQuestion, pipeline: Pipeline) -> tuple[str, ...]:
    """Return a sentence for each rule that ``pipeline`` breaks, whoever made it. Headroom may be used.

    A last rank without decoders is left out: it holds no piece. The order of resident ranks is the engine's own rule.
    """
    stages = [stage for stage in pipeline.stages if stage.num_decoders]
    degrees = {len(stage.device_ids) for stage in stages}
    if len(degrees) != 1:
        return (f"stages have {' and '.join(map(str, sorted(degrees)))} devices: all must have the same number",)
    if refusal := question.engine.refusal_of(len(stages)):
        return (refusal,)
    asked = replace(question, engine=replace(question.engine, resident=()), headroom=0.0)
    posed = pose(asked, num_stages=len(stages), degree=degrees.pop())
    known = {frozenset(place.device_ids) for place in posed.problem.places}
    for index, stage in enumerate(stages):
        if frozenset(stage.device_ids) not in known:
            return (f"stage {index} is on {' + '.join(stage.device_ids)}, which is no place for a stage here",)
        if not {stage.first_decoder, stage.end_decoder} <= set(posed.bounds):
            return (f"stage {index}: a cut at decoder {stage.end_decoder} would part layers that belong together",)
    placed = posed.placed_stages(replace(pipeline, stages=tuple(stages)))
    assert placed is not None, "places and cuts have been looked at"
    return check_stages(replace(posed.problem, latency_limit_ns=None), placed)


def piece_bounds(graph: ModelGraph) -> tuple[int, ...]:
    """Return the first decoder of each piece, and the number of decoders at the end."""
    return (0, *graph.legal_cuts, graph.num_decoders)


def pose(question: PlanQuestion, *, num_stages: int, degree: int) -> Posed:
    """Return the problem of placing ``num_stages`` stages of tensor-parallel ``degree``.

    Raises:
        InvalidProfile: There are no times for a layer or device.
    """
    graph, bounds = question.graph, piece_bounds(question.graph)
    places = Places(
        question, num_stages=num_stages, degree=degree, bounds=bounds, fixed_bytes=_workspace_bytes(question) // degree
    )
    step = reference_step(question, num_stages=num_stages)
    groups = DeviceGroups(question, num_stages=num_stages)
    layers = [_piece_layers(graph, first, end) for first, end in pairwise(bounds)]
    limit_s = question.slo.tpot_s
    problem = PlacementProblem(
        pieces=tuple(_piece(question, held) for held in layers),
        class_ns=tuple(
            tuple(round(_seconds(groups, held, group, step) * _NS) for held in layers)
            for group in places.classes.values()
        ),
        places=places.places,
        num_stages=num_stages,
        hops=places.hops(tokens=step.tokens()),
        min_kv_tokens=_least_kv_tokens(question),
        useful_kv_tokens=_useful_kv_tokens(question),
        kv_budget_bytes=question.engine.kv_device_bytes * degree if question.engine.kv_per_device else None,
        latency_limit_ns=None if limit_s is None else round(limit_s * _NS),
        charges=places.charges(),
        risk_ns=round(question.risk_s * _NS) if question.current is not None else 0,
        fixed_order=bool(question.engine.resident),
        tied_bytes=0 if len(graph.on_every_stage) > 1 else graph.shared_bytes,  # else counted in ``copied_bytes``
    )
    return Posed(question=question, problem=problem, degree=degree, bounds=bounds)


def _too_few(found: int, *, degree: int, num_stages: int) -> str:
    what = "device" if degree == 1 else f"group of {degree} devices in one NVLink island"
    plural = what.replace("device", "devices", 1) if degree == 1 else what.replace("group", "groups", 1)
    have = f"1 {what} is here" if found == 1 else f"{found or 'no'} {plural} are here"
    return f"{have}, {num_stages} stages need one each" if num_stages > 1 else f"{have}, and one is needed"


def _least_kv_tokens(question: PlanQuestion) -> int:
    """Return the KV capacity without which a stage is of no use: as configured, else for one sequence at its end."""
    configured = question.engine.kv_tokens
    return question.sequence_tokens if configured is None else configured


def _useful_kv_tokens(question: PlanQuestion) -> int:
    """Return the KV capacity beyond which more is of no use: as configured, else for as many whole contexts as run."""
    engine = question.engine
    if engine.kv_tokens is not None:
        return engine.kv_tokens
    return min(KV_UNLIMITED, max(question.sequence_tokens, engine.max_sequences * question.graph.max_context_tokens))


def _piece_layers(graph: ModelGraph, first: int, end: int) -> list[Layer]:
    layers = list(graph.decoders[first:end])
    if first == 0:
        layers.insert(0, graph.embedding)
    if end == graph.num_decoders:
        layers.append(graph.head)
    return layers


def _piece(question: PlanQuestion, layers: list[Layer]) -> Piece:
    """KV bytes are those per token of a sequence at its end: a window makes a layer's smaller."""
    tokens = question.sequence_tokens
    windows = not question.engine.is_kv_reserved  # a configured capacity is reserved in full for every layer
    kv = [-(-layer.kv_bytes(tokens) // tokens) if windows else layer.kv_bytes_per_token for layer in layers]
    return Piece(weight_bytes=question.graph.placed_bytes(layers), kv_bytes_per_token=sum(kv))


def _seconds(groups: DeviceGroups, layers: list[Layer], group: tuple[str, ...], step: ReferenceStep) -> float:
    """Return what a piece costs in one step: decoding, and its share of the prompts."""

    def of(batch: Batch) -> float:
        return sum(groups.layer_s(layer, group, batch) for layer in layers)

    return of(step.decode) + step.prefills_per_step * of(step.prefill)


def _workspace_bytes(question: PlanQuestion) -> int:
    """Return temporary values and activations of a stage at their peak: of its largest layer, at the largest step."""
    engine, graph = question.engine, question.graph
    inner = max(layer.workspace_bytes_per_token for layer in graph.layers[:-1]) * engine.max_step_tokens
    head = graph.head.workspace_bytes_per_token * min(engine.max_sequences, engine.max_step_tokens)
    passed_on = 2 * graph.embedding.activation_bytes_per_token * engine.max_step_tokens
    return max(inner, head) + passed_on
