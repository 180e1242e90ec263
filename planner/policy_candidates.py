"""From a plan to the policy's candidates: T_k and L_k from the times of each pipeline, nu_k by comparing them all.

nu_k is the CV at which a granularity does best against the others (``prediction.best_cvs``), at a load that all of them
can serve and that is high enough for bursts to matter: the rate asked for, or half of what the slowest serves.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from math import isfinite, log2

from planner.candidate_plan import Found, PlanAnswer
from planner.granularity import Candidate
from planner.prediction import Pipeline, PipelineTimes, Prediction, best_cvs
from planner.workload import Slo, Workload

_SHARE_OF_SLOWEST = 0.5
_HARDLY_ANY_PER_S = 1e-6  # in place of no requests, for which nothing can be predicted
_CALM_SHARE = 0.01  # of its capacity: next to nobody waits
_MOST_TOKENS_PER_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Granularity:
    """What a plan found for one number of stages. ``stage_bytes``: what the largest stage needs of each device."""

    num_stages: int
    times: PipelineTimes
    change_s: float
    devices: int
    stage_bytes: int = 0
    start_s: float = 0.0
    start_in_words: str = ""
    shared_devices: int = 0
    most_replicas: int = 1


def granularities_of(answer: PlanAnswer, *, shared: Container[str] = ()) -> tuple[Granularity, ...]:
    """Return what the plan found, one for each number of stages: of several degrees the one with fewest devices.

    ``shared``: ids of the devices that other tenants use.
    """
    found: dict[int, Granularity] = {}
    for plan in answer.candidates:
        if plan.found is not None and plan.found.times is not None:
            made = _granularity(plan.num_stages, plan.found, plan.found.times, shared)
            if plan.num_stages not in found or made.devices < found[plan.num_stages].devices:
                found[plan.num_stages] = made
    return tuple(found[count] for count in sorted(found))


def _granularity(num_stages: int, found: Found, times: PipelineTimes, shared: Container[str]) -> Granularity:
    device_ids = found.pipelines[0].device_ids
    return Granularity(
        num_stages=num_stages,
        times=times,
        change_s=found.costs.change_s,
        devices=len(device_ids),
        stage_bytes=max((each.needed_bytes for each in found.memory), default=0),
        shared_devices=sum(device_id in shared for device_id in device_ids),
        most_replicas=len(found.pipelines),
    )


def candidates_for(granularities: Sequence[Granularity], workload: Workload, slo: Slo) -> tuple[Candidate, ...]:
    """Return the candidates for requests of these lengths; those that serve nothing are left out."""
    pipelines = [Pipeline(each.times, workload) for each in granularities]
    calm = [_predict(pipeline, workload, rate_per_s=_HARDLY_ANY_PER_S) for pipeline in pipelines]
    usable = [
        (each, pipeline, found)
        for each, pipeline, found in zip(granularities, pipelines, calm, strict=True)
        if 0 < found.capacity_per_s * workload.output_tokens_mean < _MOST_TOKENS_PER_S
    ]
    if not usable:
        return ()
    least = min(found.capacity_per_s for _each, _pipeline, found in usable)
    at = replace(workload, rate_per_s=max(workload.rate_per_s, _SHARE_OF_SLOWEST * least))
    cvs = best_cvs([each.times for each, _pipeline, _found in usable], at, slo)
    made = [
        _candidate(each, pipeline, found, best_cv, workload)
        for (each, pipeline, found), best_cv in zip(usable, cvs, strict=True)
    ]
    return tuple(each for each in made if isfinite(each.latency_s))


def _candidate(
    each: Granularity, pipeline: Pipeline, calm: Prediction, best_cv: float | None, workload: Workload
) -> Candidate:
    alone = _predict(pipeline, workload, rate_per_s=_CALM_SHARE * calm.capacity_per_s)
    return Candidate(
        num_stages=each.num_stages,
        throughput_per_s=calm.capacity_per_s,
        latency_s=alone.ttft_s + max(0.0, workload.output_tokens_mean - 1) * alone.tpot_s,
        best_cv=best_cv,
        change_s=each.change_s,
        start_s=each.start_s,
        start_in_words=each.start_in_words,
        devices=each.devices,
        shared_devices=each.shared_devices,
        most_replicas=each.most_replicas,
        outlook=lambda rate_per_s, cv: _predict(
            pipeline, workload, rate_per_s=max(rate_per_s, _HARDLY_ANY_PER_S), cv=cv
        ),
    )


def _predict(pipeline: Pipeline, workload: Workload, *, rate_per_s: float, cv: float = 1.0) -> Prediction:
    return pipeline.predict(replace(workload, rate_per_s=rate_per_s, cv=cv), Slo(), replicas=1)


def similar(workload: Workload) -> Workload:
    """Return the workload of round figures (half powers of two) that stands for this one: what may be kept."""
    return replace(
        workload,
        rate_per_s=_round(workload.rate_per_s),
        cv=1.0,
        prompt_tokens_mean=max(1.0, _round(workload.prompt_tokens_mean)),
        output_tokens_mean=max(1.0, _round(workload.output_tokens_mean)),
    )


def _round(value: float) -> float:
    return float(2 ** (round(2 * log2(max(value, 1e-3))) / 2))
