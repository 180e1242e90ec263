"""Plans as JSON values, for the admin API and for ``flexctl plan --json``. What never happens is null."""

from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

from flexpiped.handover_records import pipeline_to_wire
from flexpiped.start_times import StartTimes
from planner.candidate_plan import CandidatePlan, Found, PlanAnswer, Verdict


def answer_to_wire(answer: PlanAnswer, *, took_s: float, starts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return everything about a plan; ``state`` is ``planned``, ``infeasible`` or ``timeout``.

    ``starts``: as ``starts_to_wire`` has it; None where no engine is there that could have parameters.
    """
    return {
        "state": _state(answer),
        "reason": answer.reason,
        "times_from": answer.times_from,
        "took_s": took_s,
        "workload": asdict(answer.workload),
        "slo": asdict(answer.slo),
        "candidates": [_candidate_to_wire(candidate) for candidate in answer.candidates],
        "starts": starts,
    }


def starts_to_wire(starts: StartTimes, answer: PlanAnswer) -> dict[str, Any]:
    """Return what is kept of the model's parameters, and what a new replica of each candidate would take. Blocks."""
    counts = sorted({candidate.num_stages for candidate in answer.candidates if candidate.found is not None})
    expected = ((count, starts.expected(count)) for count in counts)
    return {
        "kept_share": starts.kept_share(),
        "origin": starts.origin.value,
        "expected": [
            {"num_stages": count, "now_s": each.took_s, "cold_s": each.cold_s}
            for count, each in expected
            if each is not None
        ],
    }


def _state(answer: PlanAnswer) -> str:
    if answer.chosen is not None:
        return "planned"
    late = any(candidate.verdict is Verdict.TIMEOUT for candidate in answer.candidates)
    return "timeout" if late else "infeasible"


def _candidate_to_wire(candidate: CandidatePlan) -> dict[str, Any]:
    return {
        "num_stages": candidate.num_stages,
        "degree": candidate.degree,
        "verdict": candidate.verdict.value,
        "reason": candidate.reason,
        "found": None if candidate.found is None else _found_to_wire(candidate.found),
    }


def _found_to_wire(found: Found) -> dict[str, Any]:
    predicted = {name: _finite(value) for name, value in asdict(found.prediction).items()}
    return {
        "pipelines": [pipeline_to_wire(pipeline) for pipeline in found.pipelines],
        "prediction": predicted,
        "kv_tokens": found.kv_tokens,
        "best_cv": found.best_cv,
        "bottleneck_s": found.bottleneck_s,
        "gap": found.gap,
        "nested": found.nested,
        "nested_loss": found.nested_loss,
        "optimal": found.optimal,
        "change_s": found.costs.change_s,
        "fragmentation": found.costs.fragmentation,
        "moved_bytes": found.costs.moved_bytes,
        "memory": [
            asdict(memory) | {"device_ids": list(memory.device_ids), "needed_bytes": memory.needed_bytes}
            for memory in found.memory
        ],
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
