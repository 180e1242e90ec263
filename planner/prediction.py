"""What a pipeline would do under a workload: time to the first token, time per token, throughput, goodput.

A replica is a line of stages that work on micro-batches. Sequences are batched continuously: ``n`` of them decode in
``micro_batches`` groups, one token each in a cycle. A cycle lasts as long as a group takes through all stages, or as
the slowest stage (or all cores, where stages share them) works on all groups, whichever is more. Prompts join these
steps, so they cost what they add to one: while that is a share ``u`` of the slowest stage, a cycle lasts
``1 / (1 - u)`` as long.

How many sequences are inside follows from Little's law: ``n = rate * steps per request * cycle``. A token sees more of
them than there are in the mean, because most tokens are made when many are inside: ``n + z - 1``, with ``z`` their
variance over their mean (``queueing.peakedness``). At most as many are inside as KV cache and engine allow; the rate at
which that many are is the capacity. Waiting: ``planner.queueing``. A simulation in ``tests/unit/planner`` is what all
this is compared with.

Pure arithmetic on times asked for at a dozen batch sizes; well under a millisecond beside what those cost.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil, inf
from typing import Protocol

from planner import queueing
from planner.layer_costs import Batch, decode_batch
from planner.workload import Slo, Workload

_NEARLY = 0.98  # of the capacity: admission control that turns the rest away keeps it there
_RATES_TRIED = 16
_SHORTEST_S = 1e-9  # of a request: times of nothing would be served without bound
NO_TARGETS = Slo()
CVS_TRIED = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


class StageTime(Protocol):
    """The seconds of one step of one stage."""

    def __call__(self, batch: Batch, /) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTimes:
    """What a prediction needs to know of one replica.

    Attributes:
        stages: Time of one step, by stage.
        hops: Seconds to pass the activations of so many tokens on, from each stage to the next.
        kv_capacity_tokens: The smallest over the stages.
        max_sequences: That the engine runs at once.
        max_step_tokens: That the engine computes in one step of a micro-batch; longer prompts run in chunks.
        micro_batches: In flight at once; 0: one for each stage.
        stages_beside: Likewise while other stages compute on the same host; empty: as alone.
        stages_at_once: How many stages can compute at the same time; fewer than all where CPU devices share cores.
        step_overhead_s: Between the last stage's result and the next dispatch of the same micro-batch.
        sequence_overhead_s: What each sequence of the micro-batch adds to that.
    """

    stages: tuple[StageTime, ...]
    hops: tuple[Callable[[int], float], ...]
    kv_capacity_tokens: int
    max_sequences: int
    max_step_tokens: int
    micro_batches: int = 0
    stages_beside: tuple[StageTime, ...] = ()
    stages_at_once: int | None = None
    step_overhead_s: float = 0.0
    sequence_overhead_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.stages or len(self.hops) != len(self.stages) - 1:
            raise ValueError(f"{len(self.stages)} stages cannot have {len(self.hops)} hops")
        if len(self.stages_beside) not in (0, len(self.stages)):
            raise ValueError(f"{len(self.stages)} stages cannot have {len(self.stages_beside)} times beside others")
        if min(self.max_sequences, self.max_step_tokens) < 1 or self.micro_batches < 0 or self.stages_at_once == 0:
            raise ValueError("limits of a pipeline must be positive")

    def passing_s(self, stages: Sequence[float], *, tokens: int, sequences: int) -> float:
        """Return the seconds from one dispatch of a micro-batch to the next, where ``stages`` compute so long."""
        hops = sum(hop(tokens) for hop in self.hops)
        return sum(stages) + hops + self.step_overhead_s + sequences * self.sequence_overhead_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Means unless named otherwise; of all replicas together where rates are meant. ``inf``: it never happens.

    Attributes:
        ttft_s: Waiting included; ``ttft_p99_s`` likewise.
        tpot_s: At ``batch``, the sequences that decode at once in one replica under this workload.
        throughput_tokens_per_s: Tokens generated under this workload.
        capacity_per_s: Requests that can be served for ever; ``capacity_tokens_per_s`` what that generates.
        load: Arrivals over capacity; from 1 on the queue grows without bound.
        goodput_per_s: Requests served within the targets; above capacity, with the best share of them let in.
        attainment: The share of requests let in that meets the targets, at that best share.
        max_batch: Sequences that fit one replica at once.
    """

    ttft_s: float
    ttft_p99_s: float
    tpot_s: float
    batch: float
    max_batch: int
    throughput_tokens_per_s: float
    capacity_per_s: float
    capacity_tokens_per_s: float
    load: float
    goodput_per_s: float
    attainment: float

    @property
    def is_saturated(self) -> bool:
        return self.load >= 1


def predict(times: PipelineTimes, workload: Workload, slo: Slo = NO_TARGETS, *, replicas: int = 1) -> Prediction:
    """Return what ``replicas`` pipelines like ``times`` would do, arrivals shared among them at random."""
    if replicas < 1:
        raise ValueError(f"{replicas} replicas")
    return Pipeline(times, workload).predict(workload, slo, replicas=replicas)


def best_cvs(
    candidates: Sequence[PipelineTimes], workload: Workload, slo: Slo, *, replicas: Sequence[int] | None = None
) -> tuple[float | None, ...]:
    """Return for each candidate the CV at which it does best against the others: FlexPipe's nu_k.

    That is the CV of those tried at which its goodput, or where goodputs are equal the inverse of its time to the first
    token, is highest relative to the best of the others. None for a candidate that never serves anything in time.
    """
    counts = replicas or [1] * len(candidates)
    pipelines = [Pipeline(times, workload) for times in candidates]
    scores = []
    for cv in CVS_TRIED:
        at_cv = replace(workload, cv=cv)
        found = [each.predict(at_cv, slo, replicas=n) for each, n in zip(pipelines, counts, strict=True)]
        scores.append([(each.goodput_per_s, 1 / each.ttft_p99_s) for each in found])
    best: list[float | None] = []
    for index in range(len(candidates)):
        gains = [_gain(row, index) for row in scores]
        best.append(CVS_TRIED[gains.index(max(gains))] if max(gains) > 0 else None)
    return tuple(best)


def _gain(row: Sequence[tuple[float, float]], index: int) -> float:
    """Return the goodput of one candidate over the best of the others, times the ratio of their inverse latencies."""
    own = row[index]
    others = [score for other, score in enumerate(row) if other != index]
    if not own[0]:
        return 0.0
    if not others:
        return own[0] * own[1]
    rival = max(others)
    return own[0] / rival[0] * (own[1] / rival[1] if rival[1] else 1.0) if rival[0] else inf


class Pipeline:
    """One replica under requests of given lengths: the tables from which any rate and CV can be answered."""

    def __init__(self, times: PipelineTimes, lengths: Workload) -> None:
        self._times = times
        self._prompt, self._output = lengths.prompt_tokens_mean, lengths.output_tokens_mean
        self._steps = max(0.0, self._output - 1)  # the prompt's last step brings the first token
        self.max_batch = int(min(times.max_sequences, times.kv_capacity_tokens // lengths.sequence_tokens_mean))
        self._measure_prefill()
        self._sizes = [size for size in (1 << i for i in range(31)) if size < self.max_batch] + [max(1, self.max_batch)]
        measured = [self._cycle(size) for size in self._sizes]
        self._cycles = list(accumulate((cycle for cycle, _ in measured), max))  # a larger batch is never faster
        self._slowest = list(accumulate((slowest for _, slowest in measured), max))
        self._capacity_per_s = self._find_capacity() if self.max_batch else 0.0
        self._prefill_s_per_token = max(self._joining_s, _SHORTEST_S) / self._prompt
        self._cycle_of: dict[int, float] = {}  # routing asks for each request and replica

    def predict(self, workload: Workload, slo: Slo, *, replicas: int) -> Prediction:
        """Return the prediction; only rate and CVs of ``workload`` are looked at, the lengths are those built with."""
        rate = workload.rate_per_s / replicas
        own = replace(workload, cv=queueing.thinned_cv(workload.cv, replicas=replicas))
        capacity = self._capacity_per_s
        load = rate / capacity if capacity else inf
        served = min(rate, capacity)
        batch, tpot = self._settled(min(rate, _NEARLY * capacity) if load >= 1 else rate, own.cv)
        if load >= 1:
            batch, tpot = self.max_batch, self._tpot(self.max_batch, capacity)
        pool, tandem, plain = self._first_token(rate, own)
        goodput, attainment = self._goodput(min(rate, _NEARLY * capacity), own, slo)
        return Prediction(
            ttft_s=plain + pool.mean_s + tandem.mean_s,
            ttft_p99_s=plain + queueing.both_percentile_s(pool, tandem, 0.99),
            tpot_s=tpot,
            batch=batch,
            max_batch=self.max_batch,
            throughput_tokens_per_s=replicas * served * self._output,
            capacity_per_s=replicas * capacity,
            capacity_tokens_per_s=replicas * capacity * self._output,
            load=load,
            goodput_per_s=replicas * goodput,
            attainment=attainment,
        )

    def cycle_s(self, sequences: int) -> float:
        """Return the seconds in which so many sequences get a token each; prompts beside them not counted."""
        found = self._cycle_of.get(sequences)
        if found is None:
            found = self._cycle_of[sequences] = self._at(self._cycles, sequences)
        return found

    def prefill_s_per_token(self) -> float:
        """Return what a token of a prompt adds to the steps that it joins, in seconds."""
        return self._prefill_s_per_token

    # --- tables ---

    def _measure_prefill(self) -> None:
        times = self._times
        chunk = min(ceil(self._prompt), times.max_step_tokens)
        self._chunks = max(1.0, self._prompt / chunk)
        # Work is linear in the context, so a chunk with the mean context stands for all of them.
        batch = Batch(tokens=chunk, sequences=1, context_tokens=max(chunk, (self._prompt + chunk) / 2))
        stages = [stage(batch) for stage in times.stages]
        slowest = self._slowest_of(stages)
        beside = [stage(batch) for stage in times.stages_beside] or stages
        token = decode_batch(sequences=1, context_tokens=self._prompt + self._output / 2)
        alone = self._slowest_of([stage(token) for stage in times.stages_beside or times.stages])
        self._joining_s = self._chunks * max(0.0, self._slowest_of(beside) - alone)  # what a prompt adds to steps
        passing = times.passing_s(stages, tokens=chunk, sequences=1)
        self._prefill_s = passing + (self._chunks - 1) * slowest

    def _cycle(self, sequences: int) -> tuple[float, float]:
        """Return the seconds of a cycle, and of them those of the slowest stage for one micro-batch."""
        times = self._times
        groups = min(times.micro_batches or len(times.stages), sequences)
        group = ceil(sequences / groups)
        batch = decode_batch(sequences=group, context_tokens=self._prompt + self._output / 2)
        stages = [stage(batch) for stage in (times.stages_beside if groups > 1 else ()) or times.stages]
        slowest = self._slowest_of(stages)
        passing = times.passing_s(stages, tokens=group, sequences=group)
        return max(passing, groups * slowest), slowest

    def _slowest_of(self, stages: list[float]) -> float:
        at_once = self._times.stages_at_once
        return max(max(stages), sum(stages) / at_once if at_once else 0.0)

    def _find_capacity(self) -> float:
        """Return the highest rate, over the batch sizes, at which decoding and prompts together fill all time."""
        work = (
            self._steps * cycle / size + self._joining_s for size, cycle in zip(self._sizes, self._cycles, strict=True)
        )
        return 1 / max(min(work), self._joining_s, _SHORTEST_S)

    # --- at a rate ---

    def _at(self, table: list[float], batch: float) -> float:
        """Interpolate a table of ``self._sizes``; constant outside."""
        right = bisect_left(self._sizes, batch)
        if right == 0:
            return table[0]
        if right == len(self._sizes):
            return table[-1]
        low, high = self._sizes[right - 1], self._sizes[right]
        share = (batch - low) / (high - low)
        return table[right - 1] + share * (table[right] - table[right - 1])

    def _tpot(self, batch: float, rate_per_s: float) -> float:
        free = 1 - rate_per_s * self._joining_s
        return self._at(self._cycles, batch) / free if free > 0 else inf

    def _settled(self, rate_per_s: float, arrival_cv: float) -> tuple[float, float]:
        """Return sequences that decode at once and their time per token: ``n = rate * steps * tpot(n + z - 1)``."""
        free = 1 - rate_per_s * self._joining_s
        if free <= 0:
            return float(self.max_batch), inf
        more = max(0.0, queueing.peakedness(arrival_cv) - 1)
        pull = rate_per_s * self._steps / free
        below, cycle_below = 0.0, self._cycles[0]
        for size, cycle in zip(self._sizes, self._cycles, strict=True):
            if pull * cycle <= size - more:  # seen by a token: where the line through this part of the table is met
                slope = (cycle - cycle_below) / (size - below)
                seen = (more + pull * (cycle_below - slope * below)) / (1 - pull * slope)
                return min(seen - more, float(self.max_batch)), self._at(self._cycles, seen) / free
            below, cycle_below = float(size), cycle
        return min(float(self.max_batch), pull * self._cycles[-1]), self._cycles[-1] / free

    def _first_token(self, rate_per_s: float, workload: Workload) -> tuple[queueing.Wait, queueing.Wait, float]:
        """Return the waits for a place and for the stages, and the seconds to the first token without either."""
        capacity = self._capacity_per_s
        batch, _ = self._settled(min(rate_per_s, _NEARLY * capacity), workload.cv)
        step = self._at(self._slowest, batch)
        beside = step - self._slowest[0]  # decoding that shares a prompt's steps
        pool = queueing.pool_wait(
            load=rate_per_s / capacity if capacity else inf,
            inside=batch,
            slots=max(1, self.max_batch),
            capacity_per_s=capacity,
            arrival_cv=workload.cv,
            service_cv=workload.output_tokens_cv,
        )
        tandem = queueing.tandem_wait(
            rate_per_s=min(rate_per_s, _NEARLY * capacity),
            slowest_s=self._joining_s,
            arrival_cv=workload.cv,
            service_cv=workload.prompt_tokens_cv,
        )
        under_way = min(1.0, batch) * step / 2
        return pool, tandem, self._prefill_s + self._chunks * beside + under_way

    def _goodput(self, most_per_s: float, workload: Workload, slo: Slo) -> tuple[float, float]:
        """Return the most requests a second within the targets over the rates that could be let in, and their share."""
        best = (0.0, 0.0)
        for step in range(_RATES_TRIED, 0, -1):
            rate = most_per_s * step / _RATES_TRIED
            if rate <= best[0]:  # fewer are let in than are served well already
                break
            share = self._attainment(rate, workload, slo)
            best = max(best, (rate * share, share))
        return best

    def _attainment(self, rate_per_s: float, workload: Workload, slo: Slo) -> float:
        share = 1.0
        if slo.ttft_s is not None:
            pool, tandem, plain = self._first_token(rate_per_s, workload)
            share *= queueing.both_within(pool, tandem, slo.ttft_s - plain)
        if slo.tpot_s is not None:
            batch, _ = self._settled(rate_per_s, workload.cv)
            limit = self._largest_within(slo.tpot_s, rate_per_s)
            if limit < self.max_batch:
                share *= queueing.crowd_within(mean=batch, limit=limit, arrival_cv=workload.cv) if limit else 0.0
        return share

    def _largest_within(self, tpot_s: float, rate_per_s: float) -> float:
        """Return the most sequences that may decode at once at ``tpot_s``; 0 if not even one."""
        if self._tpot(1, rate_per_s) > tpot_s:
            return 0.0
        cycle = tpot_s * (1 - rate_per_s * self._joining_s)
        right = bisect_right(self._cycles, cycle)
        if right == len(self._sizes):
            return float(self.max_batch)
        low, high = self._cycles[right - 1], self._cycles[right]
        return self._sizes[right - 1] + (cycle - low) / (high - low) * (self._sizes[right] - self._sizes[right - 1])
