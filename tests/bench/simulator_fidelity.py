"""The simulator against the native engine: one trace, replayed in real time and simulated, with the same layout.

A profile is taken as ``flexctl profile`` does; one stream and eight say what a step takes beside its stages' work, of
which a profile knows nothing. From then on nothing is fitted: the simulator gets the trace, the layout, the profile and
the engine's limits. The trace is Azure's conversations (``FLEXPIPED_TRACE_DATA``), lengths and rate scaled to the
machine; without the data it is drawn with the same rate, CV and lengths.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engines.native.adapter import NativeEngine
from engines.native.options import NativeOptions, micro_batches_for
from engines.process import usable_cores
from engines.protocol import GenerationRequest, SamplingParams
from flexpiped.simulation.report import Line, chart
from planner.layout import Pipeline
from planner.model_graph import ModelGraph
from planner.prediction import PipelineTimes, predict
from planner.profile import MeasuredCosts, Profile
from planner.question import EngineLimits, PlanQuestion
from planner.request_figures import Distribution, Figures, RequestTimes, figures
from planner.simulation.clock import Clock
from planner.simulation.replica import Replica, SimulatedRequest
from planner.simulation.step_times import StepTimes
from planner.stage_times import pipeline_times
from planner.traces import Reshape, Trace, drawn_trace, parse_trace, reshaped, workload_of
from planner.workload import Slo, Workload
from tests.bench import direct
from tests.bench.profile_accuracy import graph_of, take_profile
from tests.bench.program import DEVICES, even, parser, prompts, run, setup_of, uncached_checkpoint, whole_numbers
from tests.bench.step_costs import WatchedSteps, as_measured, costs_of, tell_costs
from tests.bench.step_overheads import step_overheads
from tests.bench.tables import Bound, say, table, verdicts, write_json
from tests.support.traces import CONV, TRACE_SKIPPED, trace_folder
from topology.device import cpu_devices
from topology.topology import HostTopology

_KV_CACHE_BYTES = 128 << 20
_LIMIT_PERCENT = 15.0
_SKIP_S = 600.0  # of the trace: its first minutes are quieter than the rest
_LONGEST_PROMPT, _LONGEST_OUTPUT = 1500, 400
_ALL_AT_ONCE_S = 1e9
_SHRINK, _SHRINK_OUTPUT = 0.1, 0.25  # of lengths: some 115 tokens in and 53 out in the mean
_SHORT = Workload(
    rate_per_s=5.53,
    prompt_tokens_mean=115,
    prompt_tokens_cv=0.96,
    output_tokens_mean=53,
    output_tokens_cv=0.77,
    cv=1.09,
)


def scaled_trace(workload: Workload, *, minutes: float, load: float, capacity_per_s: float) -> Trace:
    """Return the trace at ``load`` of what the layout serves."""
    speed = load * capacity_per_s / workload.rate_per_s
    folder = trace_folder()
    wanted = Reshape(
        speed=speed,
        prompt_scale=_SHRINK,
        output_scale=_SHRINK_OUTPUT,
        max_prompt_tokens=_LONGEST_PROMPT,
        max_output_tokens=_LONGEST_OUTPUT,
        duration_s=minutes * 60,
        skip_s=_SKIP_S,
    )
    if folder is None:
        say(f"{TRACE_SKIPPED}: requests are drawn instead")
        drawn = drawn_trace(workload, duration_s=_SKIP_S + minutes * 60 * speed, seed=1)
        return reshaped(drawn, replace(wanted, prompt_scale=1.0, output_scale=1.0))
    return reshaped(parse_trace((folder / CONV).read_text()), wanted)


async def replayed(engine: NativeEngine, trace: Trace) -> list[RequestTimes]:
    """Send the requests when their time comes; times count from the start."""
    tokens = [prompts(count=1, length=each.prompt_tokens, seed=1000 + i)[0] for i, each in enumerate(trace)]
    start_s = time.monotonic()

    async def one(number: int) -> RequestTimes:
        each = trace[number]
        seen: list[float] = []
        made = GenerationRequest(
            request_id=f"fidelity-{number}",
            prompt_token_ids=tuple(tokens[number]),
            sampling=SamplingParams(max_tokens=each.output_tokens, ignore_eos=True),
        )
        async for chunk in engine.generate(made):
            seen += [time.monotonic() - start_s] * len(chunk.token_ids)
        return RequestTimes(
            arrival_s=each.arrival_s,
            first_token_s=seen[0],
            end_s=seen[-1],
            prompt_tokens=each.prompt_tokens,
            output_tokens=len(seen),
        )

    tasks = []
    for number, each in enumerate(trace):
        await asyncio.sleep(max(0.0, start_s + each.arrival_s - time.monotonic()))
        tasks.append(asyncio.create_task(one(number)))
    return list(await asyncio.gather(*tasks))


def simulated(times: PipelineTimes, trace: Trace) -> tuple[list[RequestTimes], float]:
    """Return what the simulator says of the same requests, and for how many seconds stages compute, all together."""
    clock, ended = Clock(), list[SimulatedRequest]()
    replica = Replica(clock, StepTimes(times), name="native", on_end=ended.append)
    for number, each in enumerate(trace):
        made = SimulatedRequest(
            number=number,
            arrival_s=each.arrival_s,
            prompt_tokens=each.prompt_tokens,
            output_tokens=each.output_tokens,
        )
        clock.at(each.arrival_s, lambda made=made: replica.submit(made))  # type: ignore[misc]
    clock.run(until_s=_ALL_AT_ONCE_S)
    return [
        RequestTimes(
            arrival_s=each.arrival_s,
            first_token_s=each.first_token_s,
            end_s=each.end_s,
            prompt_tokens=each.prompt_tokens,
            output_tokens=each.output_tokens,
        )
        for each in sorted(ended, key=lambda each: each.number)
    ], replica.busy_s


def times_of(options: NativeOptions, graph: ModelGraph, profile: Profile, pipeline: Pipeline) -> PipelineTimes:
    """Return the planner's times of a layout, from the profile."""
    cores = options.threads or usable_cores()
    kv_tokens = options.kv_size.blocks(graph, pipeline) * options.kv_block_tokens
    devices = cpu_devices(count=len(DEVICES), memory_bytes=options.device_memory_bytes)
    question = PlanQuestion(
        graph=graph,
        costs=MeasuredCosts(profile=profile),
        costs_beside=MeasuredCosts(profile=profile, beside_others=True),
        topology=HostTopology(host_id="bench", devices=devices),
        engine=EngineLimits(
            max_stages=len(DEVICES),
            max_sequences=options.max_num_seqs,
            max_step_tokens=options.max_num_batched_tokens,
            micro_batches=micro_batches_for(options, num_stages=pipeline.granularity, cores=cores),
        ),
        cores=cores,
        threads_per_device=options.threads_per_device,
    )
    return pipeline_times(question, pipeline, kv_tokens=kv_tokens)


def compared(measured: Figures, said: Figures) -> list[tuple[str, float, float]]:
    """Return name, measured and simulated value of what is compared."""

    def of(name: str, one: Distribution, other: Distribution) -> list[tuple[str, float, float]]:
        found = [
            (f"{name} mean", one.mean, other.mean),
            (f"{name} p99", one.percentiles["p99"], other.percentiles["p99"]),
        ]
        return [(name, a, b) for name, a, b in found if a is not None and b is not None]

    return [
        ("throughput tok/s", measured.output_tokens_per_s, said.output_tokens_per_s),
        *of("TTFT", measured.ttft_s, said.ttft_s),
        *of("TPOT", measured.tpot_s, said.tpot_s),
    ]


def plot(path: Path, runs: Sequence[tuple[str, Sequence[RequestTimes], Sequence[RequestTimes]]]) -> None:
    """Write a page: times to the first token and per token over the requests, measured and simulated."""
    parts = []
    for name, measured, said in runs:
        for what in ("ttft_s", "tpot_s"):
            lines = [
                Line(
                    name=who,
                    points=sorted((each.arrival_s, getattr(each, what)) for each in times if getattr(each, what)),
                )
                for who, times in (("measured", measured), ("simulated", said))
            ]
            parts.append(chart(f"{name}: {what.removesuffix('_s').upper()} by arrival", "s", lines))
            shares = [
                Line(name=who, points=_distribution([getattr(e, what) for e in times if getattr(e, what)]))
                for who, times in (("measured", measured), ("simulated", said))
            ]
            parts.append(
                chart(f"{name}: {what.removesuffix('_s').upper()} by share of requests (60 min: all)", "s", shares)
            )
    path.write_text(f"<!doctype html><meta charset='utf-8'><title>simulator fidelity</title>{''.join(parts)}\n")
    say(f"plot in {path}")


def _distribution(values: Sequence[float]) -> list[tuple[float, float | None]]:
    """Return the ordered values over an axis on which 60 minutes stand for all of them."""
    return [(3600 * rank / max(1, len(values) - 1), value) for rank, value in enumerate(sorted(values))]


async def main() -> int:
    made = parser("Compare simulated with measured requests on the native engine.")
    made.add_argument("--minutes", type=float, default=10.0, help="of the trace, for each layout")
    made.add_argument("--layouts", type=whole_numbers, default=(1,), help="numbers of stages")
    made.add_argument("--load", type=float, default=0.3, help="share of the predicted capacity that is asked for")
    made.add_argument("--plot", metavar="FILE", type=Path, help="write plots here, as HTML")
    made.add_argument("--budget-s", type=float, default=0.15, help="time that the profile spends on each point")
    # One stage of one thread leaves the other core to the engine core and to what sends the requests.
    made.set_defaults(threads=1, nice=0)
    arguments = made.parse_args()
    if arguments.short:
        arguments.minutes, arguments.budget_s = 0.2, 0.02
    model = await asyncio.to_thread(uncached_checkpoint, arguments)
    options = direct.options_for(model, replace(setup_of(arguments), kv_cache_bytes=_KV_CACHE_BYTES))
    graph = await asyncio.to_thread(graph_of, options)
    say("taking the profile")
    profile, _ = await take_profile(options, graph, budget_s=arguments.budget_s)
    bounds: list[Bound] = []
    runs = []
    for stages in arguments.layouts:
        name = f"{stages} stage{'s' if stages > 1 else ''}"
        pipeline = even(stages)
        times = times_of(options, graph, profile, pipeline)
        async with direct.running(options, pipeline) as engine:
            beside = await step_overheads(engine)
            times = replace(times, step_overhead_s=beside.step_s, sequence_overhead_s=beside.sequence_s)
            say(f"{name}: a token alone takes {beside.token_s * 1e3:.2f} ms")
            say(f"{name}: {beside.step_s * 1e3:.2f} ms beside stages, and {beside.sequence_s * 1e6:.0f} us a sequence")
            capacity = predict(times, _SHORT).capacity_per_s
            trace = scaled_trace(_SHORT, minutes=arguments.minutes, load=arguments.load, capacity_per_s=capacity)
            asked = workload_of(trace)
            say(f"{name}: {len(trace)} requests, {asked.rate_per_s:.2f}/s of {capacity:.2f}/s, CV {asked.cv:.2f}")
            async with WatchedSteps(engine) as watched:
                measured = await replayed(engine, trace)
        said, busy_s = simulated(times, trace)
        costs = costs_of(watched.steps, times)
        tell_costs(name, costs, watched, simulated_s=busy_s)
        queued, _ = simulated(as_measured(times, costs), trace)
        runs.append((name, measured, said))
        found = figures(measured, Slo())
        rows = compared(found, figures(said, Slo()))
        table(
            f"{name}: {len(trace)} requests at {arguments.load:.0%} of the capacity",
            ["", "measured", "simulated", "error", "with the steps as measured"],
            [
                [what, f"{a:.4g}", f"{b:.4g}", f"{b / a - 1:+.1%}", f"{c:.4g}"]
                for (what, a, b), (_, _, c) in zip(rows, compared(found, figures(queued, Slo())), strict=True)
            ],
        )
        bounds += [
            Bound(what=f"{name}: {what}", value=100 * abs(b / a - 1), limit=_LIMIT_PERCENT, at_most=True, unit="%")
            for what, a, b in rows
        ]
    verdicts(bounds)
    if arguments.plot is not None:
        plot(arguments.plot, runs)
    write_json(arguments.json, {}, bounds)
    return 0


if __name__ == "__main__":
    run(main)
