"""The workloads of FlexPipe's evaluation, each in two halves that have no request of the traces in common."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from planner.traces import (
    Reshape,
    Trace,
    TraceRequest,
    alternating,
    drawn_trace,
    parse_trace,
    repeated,
    reshaped,
    workload_of,
)
from planner.workload import Workload
from tests.support.traces import CODE, CONV

_CVS: Final = (1.0, 2.0, 4.0, 8.0)
_EVERY_S = 600.0
_LONGEST_PROMPT, _LONGEST_OUTPUT = 1792, 256  # OPT has positions for 2048 tokens, whatever the table's 4096 mean

Halves = tuple[Trace, Trace]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One workload in two halves, each from 0 s on."""

    name: str
    tuning: Trace
    reported: Trace


def read_traces(folder: Path) -> tuple[Trace, Trace]:
    """Return Azure's conversations and code, their lengths cut to what OPT takes."""
    fits = Reshape(max_prompt_tokens=_LONGEST_PROMPT, max_output_tokens=_LONGEST_OUTPUT)
    conv, code = (reshaped(parse_trace((folder / name).read_text()), fits) for name in (CONV, CODE))
    return conv, code


def workloads(conv: Trace, code: Trace, *, rate_per_s: float, half_s: float, seed: int) -> list[Work]:
    """Return all workloads. Traces are split before anything is repeated: at this rate each is over in minutes."""
    convs, codes = halves_of(conv), halves_of(code)
    conv_at_rate, code_at_rate = (_at_rate(each, rate_per_s, half_s) for each in (convs, codes))
    every_s = min(_EVERY_S, half_s / 2)
    first, second = (alternating(*both, every_s=every_s) for both in zip(conv_at_rate, code_at_rate, strict=True))
    named = [(f"CV {cv:g}", _drawn(convs, rate_per_s, cv, half_s, seed)) for cv in _CVS]
    named += [("Azure conv", conv_at_rate), ("Azure code", code_at_rate), ("conv and code in turns", (first, second))]
    return [Work(name=name, tuning=tuning, reported=reported) for name, (tuning, reported) in named]


def halves_of(trace: Sequence[TraceRequest]) -> Halves:
    """Return what came in the first half of a trace's time, and what came after, each from its first request on."""
    middle_s = trace[-1].arrival_s / 2
    first = tuple(each for each in trace if each.arrival_s < middle_s)
    return first, reshaped(trace, Reshape(skip_s=middle_s))


def _drawn(lengths: Halves, rate_per_s: float, cv: float, half_s: float, seed: int) -> Halves:
    """Return one run of gamma arrivals, cut in two, with lengths from each half, prompt and answer together."""
    draw = random.Random(seed)
    arrivals = drawn_trace(Workload(rate_per_s=rate_per_s, cv=cv), duration_s=2 * half_s, seed=seed)
    halves: tuple[list[TraceRequest], list[TraceRequest]] = ([], [])
    for each in arrivals:
        half, at_s = divmod(each.arrival_s, half_s)
        halves[int(half)].append(replace(draw.choice(lengths[int(half)]), arrival_s=at_s))
    return tuple(halves[0]), tuple(halves[1])


def _at_rate(halves: Halves, rate_per_s: float, half_s: float) -> Halves:
    """Return each half at the same rate, again from its beginning where it ends."""
    first, second = (
        repeated(reshaped(each, Reshape(speed=rate_per_s / workload_of(each).rate_per_s)), duration_s=half_s)
        for each in halves
    )
    return first, second
