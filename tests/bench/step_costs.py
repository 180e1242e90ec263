"""What the stages' steps took under load against what the profile says of them, and who used the cores meanwhile."""

import asyncio
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Self

from engines.native.adapter import NativeEngine
from planner.layer_costs import Batch
from planner.prediction import PipelineTimes, StageTime
from tests.bench.processes import cpu_s
from tests.bench.tables import table

_EVERY_S = 0.5  # a stage keeps its last 512 steps
_KINDS = (1, 4, 16)  # sequences that decode: up to here


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStep:
    """``busy_s`` is wall-clock time."""

    stage: int
    batch: Batch
    busy_s: float


@dataclass(slots=True)
class WatchedSteps:
    """All steps of all stages, and CPU seconds by process, while the scope lasts."""

    engine: NativeEngine
    steps: list[StageStep] = field(default_factory=list)
    spent_s: dict[str, float] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None
    _before: dict[str, float] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        await self.engine.stage_steps()  # what was before
        self._before = self._cpu_s()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self._take()
        self.spent_s = {who: now - self._before[who] for who, now in self._cpu_s().items()}

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            await self._take()

    async def _take(self) -> None:
        taken = await self.engine.stage_steps()
        columns = zip(taken.tokens, taken.sequences, taken.context, taken.busy_s, strict=True)
        for stage, of_stage in enumerate(columns):
            self.steps += [
                StageStep(
                    stage=stage,
                    batch=Batch(tokens=tokens, sequences=sequences, context_tokens=max(tokens, context)),
                    busy_s=busy_s,
                )
                for tokens, sequences, context, busy_s in zip(*of_stage, strict=True)
            ]

    def _cpu_s(self) -> dict[str, float]:
        pids = {"stages": self.engine.worker_pids, "engine core": (self.engine.core_pid,), "this": (os.getpid(),)}
        return {who: cpu_s(each) for who, each in pids.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """All steps of a kind: how many, seconds measured, and by the profile alone and beside other stages."""

    steps: int
    measured_s: float
    alone_s: float
    beside_s: float


def costs_of(steps: Sequence[StageStep], times: PipelineTimes) -> dict[tuple[int, str], Cost]:
    """Return the costs by stage and kind of step, in order."""
    found: dict[tuple[int, str], list[StageStep]] = defaultdict(list)
    for step in steps:
        found[step.stage, _kind(step.batch)].append(step)
    return {
        (stage, kind): Cost(
            steps=len(alike),
            measured_s=sum(step.busy_s for step in alike),
            alone_s=sum(times.stages[stage](step.batch) for step in alike),
            beside_s=sum((times.stages_beside or times.stages)[stage](step.batch) for step in alike),
        )
        for (stage, kind), alike in sorted(found.items())
    }


def as_measured(times: PipelineTimes, costs: Mapping[tuple[int, str], Cost]) -> PipelineTimes:
    """Return the same times, each kind of step stretched to what it took: then only the queueing is simulated."""

    def stretched(stage: int, time_of: StageTime) -> StageTime:
        factors = {kind: cost.measured_s / cost.beside_s for (own, kind), cost in costs.items() if own == stage}
        return lambda batch: time_of(batch) * factors.get(_kind(batch), 1.0)

    beside = tuple(stretched(stage, time_of) for stage, time_of in enumerate(times.stages_beside or times.stages))
    return replace(times, stages=beside, stages_beside=beside)


def tell_costs(name: str, costs: Mapping[tuple[int, str], Cost], watched: WatchedSteps, *, simulated_s: float) -> None:
    """Print the steps by kind, measured and by the profile, and CPU seconds. ``simulated_s``: of all stages."""
    rows = [
        [f"stage {stage}, {kind}", str(cost.steps)]
        + [f"{seconds:.2f}" for seconds in (cost.measured_s, cost.alone_s, cost.beside_s)]
        for (stage, kind), cost in costs.items()
    ]
    rows.append(
        ["all", "", f"{sum(cost.measured_s for cost in costs.values()):.2f}", f"{simulated_s:.2f} simulated", ""]
    )
    table(f"{name}: seconds of stages", ["", "steps", "measured", "by the profile: alone", "beside others"], rows)
    table(f"{name}: CPU seconds", ["", "measured"], [[who, f"{value:.1f}"] for who, value in watched.spent_s.items()])


def _kind(batch: Batch) -> str:
    """Return what a step computes, in words that sort as they grow."""
    if batch.tokens == batch.sequences:
        limit = next((n for n in _KINDS if batch.sequences <= n), None)
        return f"decoding, up to {limit:2d}" if limit else f"decoding, over {_KINDS[-1]}"
    return f"prompts, {1 << (batch.tokens - 1).bit_length():5d} tokens"
