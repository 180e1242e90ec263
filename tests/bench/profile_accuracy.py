"""Predicted against measured stage times on the native engine.

A profile is taken; then the engine serves, and what each of its stages computed is compared with what the profile says.

Layouts that the profile did not see are among them. Decoding at several numbers of streams, and prompts of several
lengths; a step's time is the stage's own (``NativeEngine.stage_steps``): the median over steps of one kind, the
smallest of several rounds.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from statistics import fmean, median

import msgspec

from engines.native.adapter import NativeEngine
from engines.native.client_messages import StageSteps
from engines.native.options import NativeOptions, micro_batches_for, threads_per_stage
from engines.native.timing import measure_layers
from engines.native.timing_messages import StageObserved, TimingPoint, TimingStarted
from engines.process import usable_cores
from flexpiped.flexctl.profile_lines import profile_lines
from flexpiped.profiles import ProfileTarget, cpu_name, fitted, model_digest
from planner.layer_costs import Batch, layer_classes, stage_s
from planner.layout import Pipeline, pipeline_of
from planner.model_graph import ModelGraph, build_model_graph
from planner.profile import MeasuredCosts, Profile
from tests.bench import direct
from tests.bench.program import DEVICES, NUM_DECODERS, checkpoint, even, parser, prompts, run, setup_of, whole_numbers
from tests.bench.tables import Bound, say, table, verdicts, write_json
from topology.device import Device, DeviceKind

_KV_CACHE_BYTES = 128 << 20  # as a configuration might have it: 8,192 tokens of the benchmarks' Llama
_LIMIT_PERCENT = 10.0
_LEAST_STEPS = 8
_PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One stage under one kind of step."""

    layout: str
    work: str
    stage: int
    streams: int
    batch: Batch
    measured_s: float
    predicted_s: float
    steps: int

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


async def take_profile(
    options: NativeOptions, graph: ModelGraph, *, budget_s: float
) -> tuple[Profile, list[StageObserved]]:
    """Measure and fit as ``flexctl profile`` does."""
    stages: list[StageObserved] = []
    started: TimingStarted | None = None
    async with aclosing(measure_layers(options, budget_s=budget_s)) as reports:
        async for report in reports:
            match report:
                case TimingStarted():
                    started = report
                case TimingPoint():
                    stages += report.stages
    assert started is not None
    target = ProfileTarget(
        model_name=options.model_directory,
        model_digest=model_digest(graph),
        dtype=graph.dtype,
        decoder_weight_bytes=graph.decoders[0].weight_bytes,
        device_name=cpu_name(),
        options=options,
    )
    made = fitted(
        target, stages, torch_version=started.torch_version, cores=started.cores, measured_at=time.strftime("%F %R")
    )
    return made, stages


class Comparison:
    """Predictions for the stages of a running engine."""

    def __init__(self, options: NativeOptions, graph: ModelGraph, profile: Profile) -> None:
        self._options = options
        self._graph = graph
        self._profile = profile
        self._cores = options.threads or usable_cores()

    def of(self, steps: StageSteps, pipeline: Pipeline, *, work: str, streams: int) -> Iterator[Compared]:
        """Compare every kind of step that was seen often enough, stage by stage."""
        in_flight = min(micro_batches_for(self._options, num_stages=pipeline.granularity, cores=self._cores), streams)
        costs = MeasuredCosts(profile=self._profile, beside_others=in_flight > 1)
        device = Device(
            id="cpu",
            kind=DeviceKind.CPU,
            memory_total_bytes=1,
            threads=threads_per_stage(
                num_stages=pipeline.granularity, threads=self._cores, per_device=self._options.threads_per_device
            ),
        )
        for index in range(pipeline.granularity):
            kinds: dict[tuple[int, int], list[tuple[int, float]]] = {}
            for tokens, sequences, context, busy_s in zip(
                steps.tokens[index], steps.sequences[index], steps.context[index], steps.busy_s[index], strict=True
            ):
                kinds.setdefault((tokens, sequences), []).append((context, busy_s))
            for (tokens, sequences), seen in kinds.items():
                if len(seen) < _LEAST_STEPS:
                    continue
                batch = Batch(tokens=tokens, sequences=sequences, context_tokens=fmean(context for context, _ in seen))
                classes = layer_classes(self._graph.stage_layers(pipeline, index))
                yield Compared(
                    layout=_name(pipeline),
                    work=f"{work}: {tokens} of {sequences}",
                    stage=index,
                    streams=streams,
                    batch=batch,
                    measured_s=median(busy_s for _, busy_s in seen),
                    predicted_s=stage_s(costs, classes, device, batch),
                    steps=len(seen),
                )


def _name(pipeline: Pipeline) -> str:
    return "+".join(str(stage.num_decoders) for stage in pipeline.stages)


async def serve(
    engine: NativeEngine, comparison: Comparison, *, streams: tuple[int, ...], lengths: tuple[int, ...], tokens: int
) -> AsyncIterator[Compared]:
    """Have the engine decode and read prompts, and compare."""
    for count in streams:
        await direct.complete(engine, prompts(count=count, length=_PROMPT_TOKENS, seed=1), max_tokens=4)
        await engine.stage_steps()
        await direct.complete(engine, prompts(count=count, length=_PROMPT_TOKENS, seed=2), max_tokens=tokens)
        decoding = _decoding(await engine.stage_steps())
        for each in comparison.of(decoding, engine.pipeline, work="decode", streams=count):
            yield each
    for length in lengths:
        await engine.stage_steps()
        for prompt in prompts(count=_LEAST_STEPS + 4, length=length, seed=3):
            await direct.complete(engine, [prompt], max_tokens=1)
        for each in comparison.of(await engine.stage_steps(), engine.pipeline, work="prompt", streams=1):
            yield each


def _decoding(steps: StageSteps) -> StageSteps:
    """Leave out the steps that read prompts."""
    kept = [
        [place for place, (t, s) in enumerate(zip(tokens, sequences, strict=True)) if t == s]
        for tokens, sequences in zip(steps.tokens, steps.sequences, strict=True)
    ]
    return StageSteps(
        call=steps.call,
        tokens=[[row[i] for i in places] for row, places in zip(steps.tokens, kept, strict=True)],
        sequences=[[row[i] for i in places] for row, places in zip(steps.sequences, kept, strict=True)],
        context=[[row[i] for i in places] for row, places in zip(steps.context, kept, strict=True)],
        busy_s=[[row[i] for i in places] for row, places in zip(steps.busy_s, kept, strict=True)],
    )


def layouts() -> tuple[Pipeline, ...]:
    """Return even layouts and two that are not; the profile sees 1, 2 and 8 stages."""
    uneven = [pipeline_of(device_ids=DEVICES[: len(cuts) + 1], cuts=cuts, num_decoders=NUM_DECODERS) for cuts in
              ([2], [1, 3, 6])]  # fmt: skip
    return (even(1), even(2), uneven[0], even(4), uneven[1], even(8))


async def main() -> int:
    made = parser("Compare predicted with measured stage times of the native engine.")
    made.add_argument("--streams", type=whole_numbers, default=(1, 4, 16, 32), help="numbers of streams that decode")
    made.add_argument("--lengths", type=whole_numbers, default=(64, 256, 500), help="prompts, in tokens")
    made.add_argument("--tokens", type=int, default=96, help="tokens of each stream")
    made.add_argument("--rounds", type=int, default=2, help="of the same requests on each layout")
    made.add_argument("--budget-s", type=float, default=0.15, help="time that the profile spends on each point")
    arguments = made.parse_args()
    if arguments.short:
        arguments.streams, arguments.lengths, arguments.tokens, arguments.budget_s = (1, 8), (64,), 24, 0.02
    model = await asyncio.to_thread(checkpoint, arguments)
    options = direct.options_for(model, replace(setup_of(arguments), kv_cache_bytes=_KV_CACHE_BYTES))
    graph = await asyncio.to_thread(graph_of, options)
    say("taking the profile")
    profile, observed = await take_profile(options, graph, budget_s=arguments.budget_s)
    for line in profile_lines(profile):
        say(line)
    write_json(
        arguments.json, {"stages": [], "profile": msgspec.to_builtins(observed)}, []
    )  # a start, if it ends early
    comparison = Comparison(options, graph, profile)
    found: list[Compared] = []
    async with direct.running(options, layouts()[0]) as engine:
        for pipeline in layouts():
            if engine.pipeline != pipeline:
                await direct.move(engine, pipeline)
            say(f"serving on {_name(pipeline)}")
            for _ in range(arguments.rounds):
                found += [
                    each
                    async for each in serve(
                        engine,
                        comparison,
                        streams=arguments.streams,
                        lengths=arguments.lengths,
                        tokens=arguments.tokens,
                    )
                ]
    found = undisturbed(found)
    _tell(found)
    bounds = [
        Bound(
            what="mean error of predicted stage times",
            value=100 * fmean(abs(each.error) for each in found),
            limit=_LIMIT_PERCENT,
            at_most=True,
            unit="%",
        )
    ]
    verdicts(bounds)
    write_json(
        arguments.json, {"stages": [_wire(each) for each in found], "profile": msgspec.to_builtins(observed)}, bounds
    )
    return 0


def undisturbed(found: list[Compared]) -> list[Compared]:
    """Return one of each kind: the round with the smallest median, because what disturbs only adds."""
    kept: dict[tuple[str, str, int, int], Compared] = {}
    for each in found:
        key = each.layout, each.work, each.streams, each.stage
        if key not in kept or each.measured_s < kept[key].measured_s:
            kept[key] = each
    return list(kept.values())


def graph_of(options: NativeOptions) -> ModelGraph:
    from engines.checkpoint import open_checkpoint

    opened = open_checkpoint(options.model_directory)
    return build_model_graph(opened.config, opened.tensors, dtype=options.dtype)


def _tell(found: list[Compared]) -> None:
    """Print one row for each layout and kind of step: the stages' mean time and errors."""
    groups: dict[tuple[str, str], list[Compared]] = {}
    for each in found:
        groups.setdefault((each.layout, each.work), []).append(each)
    rows = [
        [
            f"{layout} decoders, {work}",
            f"{fmean(e.measured_s for e in group) * 1e3:.2f}",
            f"{fmean(e.predicted_s for e in group) * 1e3:.2f}",
            f"{fmean(abs(e.error) for e in group):.1%}",
            f"{max(abs(e.error) for e in group):.1%}",
        ]
        for (layout, work), group in groups.items()
    ]
    table("stage times", ["", "measured ms", "predicted ms", "mean error", "worst stage"], rows)


def _wire(each: Compared) -> dict[str, object]:
    return {
        "layout": each.layout, "work": each.work, "stage": each.stage, "steps": each.steps,
        "streams": each.streams, "tokens": each.batch.tokens, "sequences": each.batch.sequences,
        "context_tokens": each.batch.context_tokens, "measured_s": each.measured_s, "predicted_s": each.predicted_s,
        "error": each.error,
    }  # fmt: skip


if __name__ == "__main__":
    run(main)
