"""Requests over time: read from published trace formats, or drawn at a rate and CV. Text in, requests out; no files.

Formats:

- Azure CSV: ``TIMESTAMP,ContextTokens,GeneratedTokens`` (Patel et al., Splitwise, ISCA 2024);
- Mooncake JSON lines: ``timestamp`` in ms, ``input_length``, ``output_length`` and perhaps ``hash_ids`` of the prompt's
  pieces of 512 tokens, alike where prompts are alike (Qin et al., Mooncake, FAST 2025).
"""

import csv
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from statistics import fmean, pstdev

from planner.errors import InvalidTrace
from planner.workload import Workload

PREFIX_PIECE_TOKENS = 512  # of a prompt, for each of its hash ids
_MOST_REQUESTS = 20_000_000  # of a drawn trace: some 4 GB
_NARROWEST_CV = 1e-6  # below, all are as good as alike, and the square of it may be 0
_WIDEST_CV = 1e4  # above, nearly all that is drawn is 0
_LONGEST_TRACE_S = 366 * 86400.0  # further apart is a wrong unit, or a time that stands for "none"
_LONGEST_TOKENS = 100_000_000  # of a prompt or an answer
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request: when it comes, counted from the first, and how long it is. ``prefix_ids``: see Mooncake above."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()


Trace = tuple[TraceRequest, ...]
_Numbered = tuple[int, TraceRequest]  # with its line


def parse_trace(text: str) -> Trace:
    """Return the requests of a trace in either format, by order of arrival, the first at 0 s.

    Raises:
        InvalidTrace: It is in neither format, a line cannot be read, or there is no request; the message has the line.
    """
    stripped = text.lstrip("\ufeff \r\n")
    numbered = list(_mooncake(stripped) if stripped.startswith("{") else _azure(stripped))
    if not numbered:
        raise InvalidTrace("there is no request in it")
    numbered.sort(key=lambda each: each[1].arrival_s)
    _ensure_plausible(numbered)
    first_s = numbered[0][1].arrival_s
    return tuple(replace(each, arrival_s=each.arrival_s - first_s) for _, each in numbered)


def _ensure_plausible(numbered: Sequence[_Numbered]) -> None:
    """Refuse arrivals, by order of time, that are too far apart: the line beyond the widest gap, and which is wrong."""
    first, last = numbered[0], numbered[-1]
    spans_s = last[1].arrival_s - first[1].arrival_s
    if spans_s <= _LONGEST_TRACE_S:
        return
    before, after = max(pairwise(numbered), key=lambda pair: pair[1][1].arrival_s - pair[0][1].arrival_s)
    gap_s = after[1].arrival_s - before[1].arrival_s
    raise InvalidTrace(
        f"line {after[0]}: it comes {_days(gap_s)} after the request of line {before[0]}, the one before it, and a "
        f"trace lasts {_days(_LONGEST_TRACE_S)} at most: is a time in another unit, or none?"
    )


def _days(seconds: float) -> str:
    return f"{seconds / 86400:,.0f} days" if seconds < 1e12 else f"{seconds / 86400:.2g} days"


def _azure(text: str) -> Iterator[_Numbered]:
    rows = csv.DictReader(text.splitlines())
    missing = [name for name in _AZURE_COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise InvalidTrace(
            f"neither Azure CSV (column {missing[0]} is missing) nor Mooncake JSON lines (the first one is no object)"
        )
    for row in rows:
        try:
            when = datetime.fromisoformat(row["TIMESTAMP"])
            at_s = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()  # where it is read does not matter
            yield rows.line_num, _request(at_s, row["ContextTokens"], row["GeneratedTokens"])
        except (OverflowError, TypeError, ValueError) as error:
            raise InvalidTrace(f"line {rows.line_num}: {error}") from None


def _mooncake(text: str) -> Iterator[_Numbered]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            at_s = float(row["timestamp"]) / 1e3
            if at_s < 0:
                raise ValueError(f"a time cannot be {at_s * 1e3:g} ms")
            request = _request(at_s, row["input_length"], row["output_length"])
            yield number, replace(request, prefix_ids=tuple(int(each) for each in row.get("hash_ids", ())))
        except KeyError as error:
            raise InvalidTrace(f"line {number}: {error.args[0]} is missing") from None
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise InvalidTrace(f"line {number}: {error}") from None


def _request(arrival_s: float, prompt: object, output: object) -> TraceRequest:
    """Return a request. What has no prompt or no answer is counted as one token: a server cannot do less."""
    if not math.isfinite(arrival_s):
        raise ValueError("the time is no number")
    numbers = [int(str(value)) for value in (prompt, output)]
    if min(numbers) < 0:
        raise ValueError(f"a length cannot be {min(numbers)}")
    if max(numbers) > _LONGEST_TOKENS:
        raise ValueError(f"a length of {max(numbers):.3g} tokens: at most {_LONGEST_TOKENS:,}")
    return TraceRequest(arrival_s=arrival_s, prompt_tokens=max(1, numbers[0]), output_tokens=max(1, numbers[1]))


def drawn_trace(workload: Workload, *, duration_s: float, seed: int) -> Trace:
    """Return requests with gamma-distributed times between arrivals and gamma-distributed lengths, of given means.

    Raises:
        InvalidTrace: None falls into ``duration_s``, or so many that they would fill the memory, or a CV is beyond
            what can be drawn.
    """
    widest = max(workload.cv, workload.prompt_tokens_cv, workload.output_tokens_cv)
    if widest > _WIDEST_CV:
        raise InvalidTrace(f"a CV of {widest:g} cannot be drawn: {_WIDEST_CV:g} at most")
    expected = workload.rate_per_s * duration_s
    if expected > _MOST_REQUESTS:
        message = f"{workload.rate_per_s:g} requests/s for {duration_s:g} s are {expected:.3g} requests"
        raise InvalidTrace(f"{message}: at most {_MOST_REQUESTS:,} are drawn; ask for a lower rate or a shorter time")
    draw = random.Random(seed)
    requests: list[TraceRequest] = []
    now_s = 0.0
    while True:
        now_s += _gamma(draw, mean=1 / workload.rate_per_s, cv=workload.cv)
        if now_s >= duration_s:
            break
        prompt = _gamma(draw, mean=workload.prompt_tokens_mean, cv=workload.prompt_tokens_cv)
        output = _gamma(draw, mean=workload.output_tokens_mean, cv=workload.output_tokens_cv)
        requests.append(
            TraceRequest(arrival_s=now_s, prompt_tokens=max(1, round(prompt)), output_tokens=max(1, round(output)))
        )
    if not requests:
        raise InvalidTrace(f"no request in {duration_s:g} s at {workload.rate_per_s:g} requests/s")
    return tuple(requests)


def _gamma(draw: random.Random, *, mean: float, cv: float) -> float:
    return mean if cv < _NARROWEST_CV else draw.gammavariate(1 / cv**2, mean * cv**2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshape:
    """How a trace is fitted to a server. ``None``: without bound.

    Attributes:
        speed: Arrivals come so many times as fast.
        prompt_scale, output_scale: Lengths are so many times as long, at least one token.
        max_prompt_tokens, max_output_tokens: Longer ones are cut.
        duration_s, limit: Only requests that come within so many seconds (after ``speed``), and so many of them.
        skip_s: Leave out what comes before, by the trace's own time; the first that is left comes at 0 s.
    """

    speed: float = 1.0
    prompt_scale: float = 1.0
    output_scale: float = 1.0
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    duration_s: float | None = None
    limit: int | None = None
    skip_s: float = 0.0


def reshaped(trace: Sequence[TraceRequest], how: Reshape) -> Trace:
    """Return the trace fitted to a server.

    Raises:
        InvalidTrace: Nothing is left of it.
    """
    kept = [each for each in trace if each.arrival_s >= how.skip_s]
    first_s = kept[0].arrival_s if kept else 0.0
    found = []
    for each in kept[: how.limit]:
        arrival_s = (each.arrival_s - first_s) / how.speed
        if how.duration_s is not None and arrival_s >= how.duration_s:
            break
        found.append(
            replace(
                each,
                arrival_s=arrival_s,
                prompt_tokens=_scaled(each.prompt_tokens, how.prompt_scale, how.max_prompt_tokens),
                output_tokens=_scaled(each.output_tokens, how.output_scale, how.max_output_tokens),
            )
        )
    if not found:
        raise InvalidTrace("no request is left of it")
    if not found[-1].arrival_s <= _LONGEST_TRACE_S:
        lasts = f"at {how.speed:g} times its speed it lasts {_days(found[-1].arrival_s)}"
        raise InvalidTrace(f"{lasts}, and a trace lasts {_days(_LONGEST_TRACE_S)} at most")
    return tuple(found)


def _scaled(tokens: int, scale: float, most: int | None) -> int:
    scaled = max(1, round(tokens * scale))
    return scaled if most is None else min(scaled, most)


def repeated(trace: Sequence[TraceRequest], *, duration_s: float) -> Trace:
    """Return the trace, again from its beginning where it ends, up to ``duration_s``."""
    period_s = trace[-1].arrival_s + fmean(_gaps(trace) or [1.0])
    found: list[TraceRequest] = []
    for turn in range(math.ceil(duration_s / period_s)):
        found += [replace(each, arrival_s=each.arrival_s + turn * period_s) for each in trace]
    return tuple(each for each in found if each.arrival_s < duration_s)


def alternating(first: Sequence[TraceRequest], second: Sequence[TraceRequest], *, every_s: float) -> Trace:
    """Return what ``first`` has in the even and ``second`` in the odd intervals of ``every_s`` each."""
    chosen = [each for each in first if int(each.arrival_s // every_s) % 2 == 0]
    chosen += [each for each in second if int(each.arrival_s // every_s) % 2 == 1]
    return tuple(sorted(chosen, key=lambda each: each.arrival_s))


def workload_of(trace: Sequence[TraceRequest]) -> Workload:
    """Return rate, CV and lengths of a trace as a whole."""
    prompts = [float(each.prompt_tokens) for each in trace]
    outputs = [float(each.output_tokens) for each in trace]
    gaps = _gaps(trace)
    mean_s = fmean(gaps) if gaps else 0.0
    return Workload(
        rate_per_s=1 / mean_s if mean_s else float(len(trace)),
        cv=pstdev(gaps) / mean_s if mean_s else 0.0,
        prompt_tokens_mean=fmean(prompts),
        prompt_tokens_cv=pstdev(prompts) / fmean(prompts),
        output_tokens_mean=fmean(outputs),
        output_tokens_cv=pstdev(outputs) / fmean(outputs),
    )


def _gaps(trace: Iterable[TraceRequest]) -> list[float]:
    return [after.arrival_s - before.arrival_s for before, after in pairwise(trace)]
