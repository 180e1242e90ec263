"""The plan: which pipelines serve a workload best on what there is, with every candidate that was looked at.

    question -> candidates (number of stages, tensor-parallel degree)
                  each: places -> placement -> more replicas while they are needed -> prediction
             -> comparison -> answer

A candidate's stages are balanced for the step that the workload asks of them (``stage_times.ReferenceStep``); what it
then does at any batch size is for ``planner.prediction``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from planner.budget import Budget
from planner.candidate_plan import CandidatePlan, Costs, Found, PlanAnswer, Verdict
from planner.comparison import choose
from planner.cut_family import Cuts, family_counts, nested_cuts
from planner.errors import NoFeasiblePlan, PlannerError, PlanTimeout
from planner.layout import Pipeline
from planner.moves import require_decoders
from planner.placement import Placement
from planner.places import islands
from planner.prediction import PipelineTimes, best_cvs, predict
from planner.problem import Posed, piece_bounds, pose
from planner.question import PlanQuestion
from planner.replanner import PlanSession
from planner.stage_times import pipeline_times
from topology.units import plural

_ALL_UP_TO = 4  # numbers of stages that are all candidates; beyond, each is twice the one before
_ENOUGH = 0.99  # of the arrivals served in time: no further replica is needed


def plan(question: PlanQuestion, *, clock: Callable[[], float], session: PlanSession | None = None) -> PlanAnswer:
    """Return the best plan, and why each other candidate lost. Nothing is chosen where nothing fits.

    ``clock`` only keeps the deadline: candidates share the time equally, and one that needs less leaves more.
    ``session`` has what earlier plans left: each candidate begins with what it was, repaired where that is gone.

    Raises:
        NoFeasiblePlan: More stages are asked for than there can be.
        InvalidLayout: The layout in force is not one of this model.
        InvalidProfile: There are no times for a layer or device.
    """
    if question.current is not None:
        require_decoders(question.current, question.graph)
    degrees = _degrees(question)
    wanted = [(count, degree) for count in stage_counts(question) for degree in degrees]
    family = _family(question)
    labels = [(count, degree) for count, degree in wanted if count * degree <= len(question.topology.devices)] or wanted
    end_s = clock() + question.deadline_s
    looked: list[_Looked] = []
    for index, (count, degree) in enumerate(labels):
        share_s = max(0.0, end_s - clock()) / (len(labels) - index)
        cuts = family.get(count)
        budget = Budget(limit_s=share_s, clock=clock)
        looked.append(_look(question, count, degree, cuts, budget, session or PlanSession()))
    return _answer(question, looked)


def stage_counts(question: PlanQuestion) -> tuple[int, ...]:
    """Return the numbers of stages that are candidates, fewest first.

    Raises:
        NoFeasiblePlan: The number that is asked for is not possible; the message says how many are.
    """
    num_pieces = len(piece_bounds(question.graph)) - 1
    resident = question.engine.resident
    num_places = min(len(resident) if resident else len(question.topology.devices), question.engine.max_stages)
    limit = min(num_pieces, num_places)
    if question.num_stages is not None:
        if refusal := question.engine.refusal_of(question.num_stages):
            raise NoFeasiblePlan(refusal)
        if question.num_stages > limit:
            raise NoFeasiblePlan(stage_limit_sentence(num_decoders=num_pieces, num_devices=num_places))
        return (question.num_stages,)
    least = min(2, len(resident)) if resident else 1
    wanted = {*range(1, _ALL_UP_TO + 1), limit, *(2**power for power in range(limit.bit_length()))}
    if question.current is not None:
        wanted.add(question.current.granularity)
    return tuple(sorted(count for count in wanted if least <= count <= limit))


def stage_limit_sentence(*, num_decoders: int, num_devices: int) -> str:
    """Return how many stages there can be at most, and why."""
    limit = min(num_decoders, num_devices)
    devices = f"{plural(num_devices, 'device')} {'is' if num_devices == 1 else 'are'}"
    layers = plural(num_decoders, "decoder layer")
    return f"the model has {layers} and {devices} here, so at most {plural(limit, 'stage')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Looked:
    plan: CandidatePlan
    found: Found | None = None
    times: PipelineTimes | None = None


def _degrees(question: PlanQuestion) -> Sequence[int]:
    """Return the engine's tensor-parallel degrees for which an island is large enough; all where none is."""
    resident = question.engine.resident
    if resident:
        return (len(resident[0]),)
    largest = max(len(island.devices) for island in islands(question.topology))
    return tuple(degree for degree in question.engine.degrees if degree <= largest) or question.engine.degrees


def _family(question: PlanQuestion) -> Mapping[int, Cuts]:
    """Return the nested cuts by number of stages, balanced for the first device; they hold for every degree."""
    posed = pose(replace(question, num_stages=None), num_stages=1, degree=_degrees(question)[0])
    limit = min(len(posed.problem.pieces), question.engine.max_stages, len(question.topology.devices))
    return nested_cuts(posed.problem.class_ns[0], family_counts(limit))


def _look(
    question: PlanQuestion, num_stages: int, degree: int, cuts: Cuts | None, budget: Budget, session: PlanSession
) -> _Looked:
    """Place one candidate, as many replicas as are needed and possible, and say what it would do."""
    label = CandidatePlan(num_stages=num_stages, degree=degree, verdict=Verdict.LOST, reason="")
    try:
        posed = pose(question, num_stages=num_stages, degree=degree)
        chosen, nested_loss = _nested_or_free(question, posed, cuts, budget, session)
        placed = [chosen]
    except PlanTimeout as error:
        return _Looked(plan=replace(label, verdict=Verdict.TIMEOUT, reason=str(error)))
    except NoFeasiblePlan as error:
        return _Looked(plan=replace(label, verdict=Verdict.INFEASIBLE, reason=str(error)))
    kv_tokens = chosen.posed.kv_tokens(chosen.placement)
    times = pipeline_times(question, placed[0].pipeline, kv_tokens=kv_tokens)
    placed += _more_replicas(question, placed[0], times, budget)
    return _Looked(plan=label, found=_found(question, placed, times, nested_loss), times=times)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """One replica: its placement, in the problem that it answers."""

    posed: Posed
    placement: Placement

    @property
    def pipeline(self) -> Pipeline:
        return self.posed.pipeline(self.placement)

    @property
    def is_nested(self) -> bool:
        return len(self.posed.problem.pieces) == len(self.placement.stages)


def _placed(posed: Posed, budget: Budget, session: PlanSession | None = None) -> _Placed:
    key = posed.problem.num_stages, posed.degree, posed.bounds, posed.question.engine.resident
    return _Placed(posed=posed, placement=posed.solve(budget, session.replanner(key) if session else None))


def _nested_or_free(
    question: PlanQuestion, posed: Posed, cuts: Cuts | None, budget: Budget, session: PlanSession
) -> tuple[_Placed, float | None]:
    """Return the placement to use and what nested cuts lose against free ones; None where there are none that fit.

    1. Free cuts say how good it can be.
    2. Nested cuts are taken where they lose little,
    3. but not where only free ones leave the layout in force as it is.
    """
    free = _placed(posed, budget if cuts is None else budget.part(0.6), session)  # 1
    if cuts is None:
        return free, None
    try:
        nested = _placed(posed.with_cuts(cuts), budget, session)
    except PlannerError:  # the devices' memories ask for other cuts
        return free, None
    best = free.placement.scores.bottleneck_ns
    loss = nested.placement.scores.bottleneck_ns / max(1, best) - 1
    stays = free.placement.scores.change_ns == 0 < nested.placement.scores.change_ns  # 3
    return (free if loss > question.nested_loss or stays else nested), max(0.0, loss)


def _more_replicas(question: PlanQuestion, first: _Placed, times: PipelineTimes, budget: Budget) -> Iterator[_Placed]:
    """Yield pipelines on what the ones before leave, while the workload asks for more and there is room."""
    posed = first.posed.without(first.pipeline.device_ids)
    for count in range(1, question.max_replicas):
        reached = predict(times, question.workload, question.slo, replicas=count)
        if reached.goodput_per_s >= question.workload.rate_per_s * _ENOUGH:
            return
        try:
            replica = _placed(posed, budget)
        except PlannerError:  # no room for another one, or no time to find it
            return
        posed = posed.without(replica.pipeline.device_ids)
        yield replica


def _found(question: PlanQuestion, placed: Sequence[_Placed], times: PipelineTimes, nested_loss: float | None) -> Found:
    scores = [each.placement.scores for each in placed]
    kv_tokens = min(each.posed.kv_tokens(each.placement) for each in placed)
    return Found(
        pipelines=tuple(each.pipeline for each in placed),
        prediction=predict(times, question.workload, question.slo, replicas=len(placed)),
        kv_tokens=kv_tokens,
        best_cv=None,
        bottleneck_s=max(score.bottleneck_ns for score in scores) / 1e9,
        gap=max(each.placement.gap for each in placed),
        optimal=all(each.placement.optimal for each in placed),
        nested=nested_loss is not None and placed[0].is_nested,
        nested_loss=nested_loss,
        costs=Costs(
            change_s=sum(score.change_ns for score in scores) / 1e9,
            fragmentation=sum(score.fragmentation for score in scores),
            moved_bytes=sum(score.moved_bytes for score in scores),
        ),
        memory=placed[0].posed.memory(placed[0].placement, kv_tokens=kv_tokens),
        times=times,
    )


# --- the answer ---


def _answer(question: PlanQuestion, looked: Sequence[_Looked]) -> PlanAnswer:
    found = _with_best_cvs(question, looked)
    if found:
        choice = choose(found, question.workload)
        plans = [
            replace(each.plan, found=found.get(index), reason=choice.reasons.get(index, each.plan.reason))
            for index, each in enumerate(looked)
        ]
        reason = _why(question, decided_by=choice.decided_by, num_possible=len(found), best=found[choice.best])
        plans[choice.best] = replace(plans[choice.best], verdict=Verdict.CHOSEN, reason=reason)
    else:
        plans = [each.plan for each in looked]
        reason = _why_nothing(plans)
    return PlanAnswer(
        candidates=(*plans, *_ruled_out(question)),
        reason=reason,
        times_from=question.costs.source,
        workload=question.workload,
        slo=question.slo,
    )


def _ruled_out(question: PlanQuestion) -> Iterator[CandidatePlan]:
    """Yield the number of stages from which on the engine refuses, where devices and layers would allow it."""
    count = question.engine.max_stages + 1
    could_be = count <= min(len(piece_bounds(question.graph)) - 1, len(question.topology.devices))
    reason = question.engine.refusal_of(count)
    if reason and could_be and question.num_stages is None:
        yield CandidatePlan(num_stages=count, degree=_degrees(question)[0], verdict=Verdict.INFEASIBLE, reason=reason)


def _with_best_cvs(question: PlanQuestion, looked: Sequence[_Looked]) -> Mapping[int, Found]:
    """Return the candidates that can be, by position, with the CV at which each does best against the others."""
    possible = [(index, each.found, each.times) for index, each in enumerate(looked) if each.found and each.times]
    replicas = [len(found.pipelines) for _, found, _ in possible]
    cvs = best_cvs([times for _, _, times in possible], question.workload, question.slo, replicas=replicas)
    return {index: replace(found, best_cv=cv) for (index, found, _), cv in zip(possible, cvs, strict=True)}


def _why(question: PlanQuestion, *, decided_by: str, num_possible: int, best: Found) -> str:
    if question.num_stages is not None and num_possible == 1:
        return "as many stages as were asked for"
    if num_possible == 1:
        return "the only candidate that fits"
    goodput, rate = best.prediction.goodput_per_s, question.workload.rate_per_s
    serves = f"serves {goodput:.3g} of {rate:.3g} requests/s in time"
    return f"{serves}; best of {num_possible} candidates by {decided_by}"


def _why_nothing(plans: Sequence[CandidatePlan]) -> str:
    """Return the reason of the candidate with most stages: what fits least needs is what is missing in the end."""
    late = [each for each in plans if each.verdict is Verdict.TIMEOUT]
    last = (late or plans)[-1]
    return last.reason


def require_plan(answer: PlanAnswer) -> Found:
    """Return what was chosen.

    Raises:
        NoFeasiblePlan: Proven: nothing fits; the message has the numbers.
        PlanTimeout: Nothing was found in time for at least one candidate, and no other one fits.
    """
    if answer.chosen is not None and answer.chosen.found is not None:
        return answer.chosen.found
    if any(each.verdict is Verdict.TIMEOUT for each in answer.candidates):
        raise PlanTimeout(answer.reason)
    raise NoFeasiblePlan(answer.reason)
