"""What the live comparison measures and says: its trace, what became of it by system, tables and bounds. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Final

from planner.request_figures import Figures, RequestTimes, figures
from planner.simulation.outcome import most_in_a_minute
from planner.traces import Trace, TraceRequest, drawn_trace
from planner.workload import Slo, Workload
from tests.bench.tables import Bound, ms, table

LIVE: Final = (1, 2)  # stages that this machine has cores for
LENGTHS: Final = Workload(
    rate_per_s=1.0, prompt_tokens_mean=96, prompt_tokens_cv=0.5, output_tokens_mean=48, output_tokens_cv=0.5
)
_TTFT_TIMES, _TPOT_TIMES = 10.0, 5.0  # of a lone request: the targets
_MOST_CHANGES_PER_MIN: Final = 2
_AUTO: Final = "auto"
_CHANGE: Final = re.compile(r"(?:\d+ -> |back from \d+ to )(\d+) stage")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the trace."""

    cv: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OneStage:
    """What one stage was measured to do."""

    capacity_per_s: float
    ttft_s: float  # of a lone request
    tpot_s: float

    @property
    def slo(self) -> Slo:
        return Slo(ttft_s=_TTFT_TIMES * self.ttft_s, tpot_s=_TPOT_TIMES * self.tpot_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What became of the trace under one system. ``decisions``: of auto, those that changed something."""

    name: str
    times: Sequence[RequestTimes]
    device_s: float
    decisions: Sequence[Mapping[str, Any]] = ()


def phased(phases: Sequence[Phase], *, rate_per_s: float, seed: int) -> Trace:
    """Return the requests of all phases, one after the other."""
    found: list[TraceRequest] = []
    began_s = 0.0
    for number, phase in enumerate(phases):
        asked = replace(LENGTHS, rate_per_s=rate_per_s, cv=phase.cv)
        drawn = drawn_trace(asked, duration_s=phase.seconds, seed=seed + number)
        found += [replace(each, arrival_s=began_s + each.arrival_s) for each in drawn]
        began_s += phase.seconds
    return tuple(found)


def length_s(times: Sequence[RequestTimes]) -> float:
    return max(each.end_s or each.arrival_s for each in times)


def devices_over_time(marks: Sequence[Mapping[str, Any]], *, begins_with: int, until_s: float) -> float:
    """Return the devices that stages had, over time, from changes as they are told (``planner.policy_words``)."""
    counts = [begins_with]
    for mark in marks:
        found = _CHANGE.match(str(mark["message"]))
        counts.append(int(found[1]) if found else counts[-1])
    ats = [0.0, *(float(each["after_s"]) for each in marks), until_s]
    return sum(count * max(0.0, after - before) for count, (before, after) in zip(counts, pairwise(ats), strict=True))


def fixed_name(stages: int) -> str:
    return f"{stages} stage{'s' if stages > 1 else ''}"


def tell(found: Sequence[Served], phases: Sequence[Phase], slo: Slo) -> None:
    head = ["", "failed", "TTFT p50 ms", "p99", "TPOT p99", "latency p50", "p99", "in time/s", "in time", "devices"]
    rows = []
    for each in found:
        seen = figures(each.times, slo)
        rows.append(
            [
                each.name,
                f"{seen.failed}",
                *(_of(seen.ttft_s.percentiles, name) for name in ("p50", "p99")),
                _of(seen.tpot_s.percentiles, "p99"),
                *(_of(seen.latency_s.percentiles, name) for name in ("p50", "p99")),
                f"{seen.goodput_per_s:.2f}",
                f"{seen.attainment:.1%}",
                f"{each.device_s / length_s(each.times):.2f}",
            ]
        )
    table(f"{len(found[0].times)} requests, targets TTFT {slo.ttft_s:.2f} s, TPOT {slo.tpot_s:.3f} s", head, rows)
    bounds = list(pairwise([0.0, *accumulate(phase.seconds for phase in phases)]))
    parts = [[_in_phase(each, bound, slo) for bound in bounds] for each in found]
    table(
        "by phase: TTFT p99 ms, in time",
        ["", *(f"CV {phase.cv:g}, {phase.seconds:g} s" for phase in phases)],
        [[each.name, *cells] for each, cells in zip(found, parts, strict=True)],
    )
    for each in found:
        for mark in each.decisions:
            print(f"  {each.name}, after {mark['after_s']:5.1f} s  {mark['message']}")


def _in_phase(served: Served, bound: tuple[float, float], slo: Slo) -> str:
    inside = [each for each in served.times if bound[0] <= each.arrival_s < bound[1]]
    seen = figures(inside, slo)
    return f"{_of(seen.ttft_s.percentiles, 'p99')}, {seen.attainment:.1%}"


def _of(percentiles: Mapping[str, float | None], name: str) -> str:
    value = percentiles[name]
    return "-" if value is None else ms(value)


def bounds_of(found: Sequence[Served], slo: Slo) -> list[Bound]:
    seen: dict[str, Figures] = {each.name: figures(each.times, slo) for each in found}
    fixed = [seen[fixed_name(stages)] for stages in LIVE]
    best = max(fixed, key=lambda each: each.goodput_per_s)
    marks = [mark for each in found if each.name == _AUTO for mark in each.decisions]
    changes = most_in_a_minute([float(mark["after_s"]) for mark in marks])
    p99 = [each.ttft_s.percentiles["p99"] or 0.0 for each in (seen[_AUTO], *fixed)]
    return [
        Bound(
            what="requests that failed", value=sum(e.failed for e in (*fixed, seen[_AUTO])), limit=0, at_most=True,
            unit="",
        ),
        Bound(
            what="changes by auto in any minute", value=changes, limit=_MOST_CHANGES_PER_MIN, at_most=True, unit=""
        ),
        Bound(what="goodput, auto / best fixed", value=seen[_AUTO].goodput_per_s / best.goodput_per_s, limit=None),
        Bound(what="TTFT p99, auto / best fixed", value=p99[0] / min(p99[1:]), limit=None),
        Bound(what="TTFT p99, auto / worst fixed", value=p99[0] / max(p99[1:]), limit=None),
    ]  # fmt: skip
