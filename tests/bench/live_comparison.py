"""Live on this machine: requests whose CV jumps, with auto on and with each fixed layout in turn.

A CPU device is one core and a KV budget here: a stage computes with one thread, whether it is the only one or not, and
its layers share that budget, which is small enough to bind. So two stages have twice the compute and twice the KV cache
of one. One stage says what it can do (requests at once: capacity; lone ones: what the targets are a multiple of), then
every system serves the same trace: gamma arrivals of CV 1, of a higher one, and of CV 1 again, at the same rate.
Durations of ``[auto]`` are the defaults over ``--pace``, as the trace lasts minutes, not hours. Simulated beside: these
and deeper layouts on as many such devices, and auto with two and with all of them.

python -m tests.bench.live_comparison
"""

import argparse
import asyncio
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

from flexpiped.load.replay import Progress, replay
from flexpiped.load.target import Target
from flexpiped.profiles import ProfileStore, profile_folder
from planner.profile import Profile
from planner.request_figures import RequestTimes, figures
from planner.traces import Trace, TraceRequest
from planner.workload import Slo
from tests.bench import direct
from tests.bench.daemon_process import DaemonProcess, daemon
from tests.bench.live_figures import (
    LENGTHS,
    LIVE,
    OneStage,
    Phase,
    Served,
    bounds_of,
    devices_over_time,
    fixed_name,
    length_s,
    phased,
    tell,
)
from tests.bench.live_simulation import DURATIONS, LiveSimulation, paced
from tests.bench.profile_accuracy import graph_of, take_profile
from tests.bench.program import EngineSetup, checkpoint, parser, run, whole_numbers
from tests.bench.tables import say, verdicts, write_json

_KV_DEVICE_BYTES: Final = 32 << 20  # with all layers 2,048 tokens of the benchmarks' Llama, some 14 of these requests
_AT_ONCE, _LONE = 64, 8  # requests that the one stage is measured with


class Stand:
    """Model, profile and engine set-up of all systems. Each daemon has a folder of its own for what it remembers."""

    def __init__(self, model: Path, setup: EngineSetup, profile: Profile, folder: Path) -> None:
        self._model = model
        self._setup = setup
        self._profile = profile
        self._folder = folder

    async def one_stage(self, *, requests: int) -> OneStage:
        """Measure what one stage does."""
        async with self._daemon("measured", stages=1) as server:
            await _sent(server, _spaced(_LONE, gap_s=0.0), "a warm-up")
            lone = [(await _sent(server, _spaced(1, gap_s=0.0), ""))[0] for _ in range(_LONE)]
            ends = sorted(each.end_s or 0.0 for each in await _sent(server, _spaced(requests, gap_s=0.0), "at once"))
            early, late = requests // 5, requests - requests // 5 - 1  # without those that begin and end alone
            return OneStage(
                capacity_per_s=(late - early) / (ends[late] - ends[early]),
                ttft_s=median(each.ttft_s or 0.0 for each in lone),
                tpot_s=median(each.tpot_s or 0.0 for each in lone),
            )

    async def fixed(self, trace: Trace, *, stages: int) -> Served:
        """Serve the trace on one layout."""
        async with self._daemon(f"fixed-{stages}", stages=stages) as server:
            times = await _sent(server, trace, f"{stages} fixed")
        return Served(name=fixed_name(stages), times=times, device_s=stages * length_s(times))

    async def adapting(self, trace: Trace, *, slo: Slo, pace: float) -> Served:
        """Serve the trace with auto on, from one stage."""
        more = _auto(pace, slo=slo, rate_per_s=len(trace) / trace[-1].arrival_s)
        async with self._daemon("auto", stages=1, more=more) as server:
            began_s = time.time()
            times = await _sent(server, trace, "auto on")
            decisions = await server.decisions()
        changes = [each for each in decisions if each["fields"]["verb"] != "keep"]
        marks = [{"after_s": each["time_unix_s"] - began_s, "message": each["message"]} for each in changes]
        return Served(
            name="auto",
            times=times,
            decisions=marks,
            device_s=devices_over_time(marks, begins_with=1, until_s=length_s(times)),
        )

    def _daemon(self, name: str, *, stages: int, more: str = "") -> Any:
        state = self._folder / name
        store = ProfileStore(folder=profile_folder({"STATE_DIRECTORY": str(state)}, home=state))
        store.save(self._profile)
        return daemon(self._model, self._setup, stages=stages, more=more, environment={"STATE_DIRECTORY": str(state)})


async def _sent(server: DaemonProcess, trace: Trace, what: str) -> list[RequestTimes]:
    """Replay a trace, as ``flexctl bench`` does."""
    told_s = 0.0

    def show(progress: Progress) -> None:
        nonlocal told_s
        if what and progress.elapsed_s - told_s > 20.0:
            told_s = progress.elapsed_s
            say(f"{what}: {progress.ended} of {progress.of} served, {progress.failed} failed")

    return await replay(Target(url=f"{server.url}/v1", model="bench"), trace, seed=1, on_progress=show)


def _spaced(count: int, *, gap_s: float) -> Trace:
    """Return requests of mean length."""
    prompt, output = round(LENGTHS.prompt_tokens_mean), round(LENGTHS.output_tokens_mean)
    return tuple(
        TraceRequest(arrival_s=index * gap_s, prompt_tokens=prompt, output_tokens=output) for index in range(count)
    )


def _auto(pace: float, *, slo: Slo, rate_per_s: float) -> str:
    """Return the configuration of auto."""
    durations = asdict(paced(pace))
    keys = "\n".join(f"{name} = {durations[name]:g}" for name in DURATIONS)
    return f"""
[slo]
ttft_s = {slo.ttft_s}
tpot_s = {slo.tpot_s}
[workload]
rate_per_s = {rate_per_s}
prompt_tokens = {LENGTHS.prompt_tokens_mean}
output_tokens = {LENGTHS.output_tokens_mean}
[auto]
mode = "on"
interval_s = {5 / pace:g}
windows_s = [{30 / pace:g}, {durations["cv_window_s"]:g}]
latency_window_s = {60 / pace:g}
{keys}
"""


def _options() -> argparse.Namespace:
    made = parser("Compare auto with fixed layouts, live.")
    made.add_argument("--load", type=float, default=0.6, help="arrivals over the measured capacity of one stage")
    made.add_argument("--cv", type=float, default=4.0, help="of the phase in the middle")
    made.add_argument("--phase-s", type=float, default=60.0, help="length of each of the three phases")
    made.add_argument("--pace", type=float, default=5.0, help="durations of [auto] are the defaults over this")
    made.add_argument("--simulate", type=whole_numbers, default=(1, 2, 4, 8), help="stages of simulated layouts")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--budget-s", type=float, default=0.08, help="time that the profile spends on each point")
    options = made.parse_args()
    if options.short:
        options.phase_s, options.pace, options.budget_s = 6.0, 20.0, 0.01
    return options


async def main() -> int:
    options = _options()
    phases = [Phase(cv=cv, seconds=options.phase_s) for cv in (1.0, options.cv, 1.0)]
    model = await asyncio.to_thread(checkpoint, options)
    setup = EngineSetup(
        threads=len(LIVE),
        nice=options.nice,
        kv_device_bytes=_KV_DEVICE_BYTES,
        threads_per_device=1,
        devices=len(LIVE),
    )
    engine = direct.options_for(model, setup)
    graph = await asyncio.to_thread(graph_of, engine)
    say("taking the profile")
    profile, _ = await take_profile(engine, graph, budget_s=options.budget_s)
    with TemporaryDirectory(prefix="flexpiped-live-") as name:
        stand = Stand(model, setup, profile, Path(name))
        alone = await stand.one_stage(requests=_AT_ONCE // 2 if options.short else _AT_ONCE)
        trace = phased(phases, rate_per_s=options.load * alone.capacity_per_s, seed=options.seed)
        say(
            f"one stage: {alone.capacity_per_s:.2f} requests/s; a lone request: TTFT {alone.ttft_s * 1e3:.1f} ms, "
            f"TPOT {alone.tpot_s * 1e3:.2f} ms; {len(trace)} requests follow, {options.load:.0%} of that"
        )
        found = [await stand.fixed(trace, stages=stages) for stages in LIVE]
        found.append(await stand.adapting(trace, slo=alone.slo, pace=options.pace))
    simulation = LiveSimulation(engine, graph, profile, alone)
    found += [simulation.fixed(trace, stages=stages) for stages in options.simulate]
    found += [
        simulation.adapting(trace, most=most, pace=options.pace) for most in sorted({max(LIVE), max(options.simulate)})
    ]
    tell(found, phases, alone.slo)
    bounds = bounds_of(found, alone.slo)
    verdicts(bounds)
    wire = {
        each.name: asdict(figures(each.times, alone.slo))
        | {"device_s": each.device_s, "decisions": list(each.decisions), "requests": [asdict(e) for e in each.times]}
        for each in found
    }
    write_json(options.json, {"one_stage": asdict(alone), "systems": wire}, bounds)
    return 0


if __name__ == "__main__":
    run(main)
