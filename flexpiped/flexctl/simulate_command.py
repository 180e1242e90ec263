"""``flexctl simulate``: what the policy would do under a trace, on a simulated clock. Imported lazily."""

import json
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexpiped.flexctl.client import AdminClient, BadUsage
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.output_file import ensure_writable, write_text
from flexpiped.flexctl.terminal import Screen
from flexpiped.flexctl.text import bar, format_age
from flexpiped.flexctl.traffic_options import add_traffic, count, slo_of, trace_of

if TYPE_CHECKING:
    from flexpiped.settings import AutoSettings, Settings
    from flexpiped.simulation.scenario import Scenario
    from planner.simulation.outcome import Outcome
    from planner.simulation.system import System
    from planner.traces import Trace

_SYSTEMS = ("flexpiped", "static", "best-static", "cold-start", "oracle")
_REDRAWN_S = 0.1
_DEVICES, _HOSTS, _OCCUPANCY = 82, 42, 0.47  # FlexPipe's cluster
_TARGET_TTFT_S, _TARGET_TPOT_S = 5.0, 0.4


def add_arguments(parser: ArgumentParser) -> None:
    """Add what ``flexctl simulate`` takes."""
    parser.add_argument("--system", choices=_SYSTEMS, default="flexpiped", help="who decides (default: flexpiped)")
    parser.add_argument("--stages", metavar="N", type=count, help="of a static or cold-start system (default: fewest)")
    parser.add_argument("--replicas", metavar="N", type=count, help="at most so many, or of a static system so many")
    parser.add_argument("--html", metavar="FILE", help="write a report with plots here")
    what = parser.add_argument_group("model and devices", "default: OPT-66B as FlexPipe's table has it, 82 GPUs")
    what.add_argument("--model", metavar="DIR", help="a model, planned for --topology or this host")
    what.add_argument("--topology", metavar="FILE", help="snapshot of a host or cluster, or a machine by its name")
    what.add_argument("--config", metavar="FILE", help="configuration of the daemon, with --model or --topology")
    what.add_argument(
        "--cluster", metavar="FOLDER", help="node and pod list of the openb cluster: what neighbours hold"
    )
    what.add_argument("--devices", metavar="N", type=count, help=f"GPUs (default {_DEVICES})")
    what.add_argument("--hosts", metavar="N", type=count, help=f"that they are in (default {_HOSTS})")
    what.add_argument("--occupancy", metavar="X", type=float, help=f"of their memory (default {_OCCUPANCY})")
    add_traffic(parser)


def simulate(client: AdminClient, screen: Screen, options: Namespace) -> Exit:  # noqa: ARG001
    """Simulate, showing how far it is, then the figures; asks no daemon."""
    from flexpiped.flexctl.offline_errors import offline_errors
    from planner.simulation.run import Setting
    from planner.simulation.run import simulate as run
    from planner.traces import workload_of

    _refuse_what_counts_for_nothing(options)
    options.slo_ttft = options.slo_ttft or _TARGET_TTFT_S
    options.slo_tpot = options.slo_tpot or _TARGET_TPOT_S
    trace, settings = trace_of(options), _settings(options)
    auto = settings.auto
    if options.html:
        ensure_writable(options.html)
    scenario = _scenario(options, trace)
    setting = Setting(
        trace=trace,
        shapes=scenario.shapes,
        slo=slo_of(options),
        memory_changes=scenario.memory_changes,
        expected=workload_of(trace),
        interval_s=auto.interval_s,
        windows_s=auto.windows_s,
        drain_deadline_s=settings.handover.drain_deadline_s,
    )
    began_s, shown_s = time.monotonic(), 0.0

    def show(now_s: float, end_s: float) -> None:
        nonlocal shown_s
        if not options.json and time.monotonic() - shown_s > _REDRAWN_S:
            shown_s = time.monotonic()
            screen.live(
                f"simulating  {bar(now_s, end_s)}  {format_age(now_s)} of {format_age(end_s)}   "
                f"{shown_s - began_s:.0f} s"
            )

    with offline_errors():
        outcome = run(setting, scenario.pool(), _system(options, auto, scenario, trace), on_progress=show)
    _tell(screen, options, scenario, outcome, took_s=time.monotonic() - began_s)
    return Exit.DONE


def _refuse_what_counts_for_nothing(options: Namespace) -> None:
    """Raise ``BadUsage`` for an option that these others leave without effect, or that cannot be."""
    files = next((f"--{name}" for name in ("model", "topology", "config") if getattr(options, name)), "")
    cluster = "--cluster" if options.cluster else ""
    of_system = f"--system {options.system}"
    others = (
        ("cluster", files),
        ("devices", files),
        ("hosts", files or cluster),
        ("occupancy", files or cluster),
        ("stages", "" if options.system in ("static", "cold-start") else of_system),
        ("replicas", "" if options.system in ("static", "flexpiped") else of_system),
    )
    for name, instead in others:
        if getattr(options, name) is not None and instead:
            raise BadUsage("bad_input", f"--{name} counts for nothing with {instead}")
    if options.occupancy is not None and not 0 <= options.occupancy < 1:
        raise BadUsage("bad_input", f"--occupancy: from 0 to below 1, not {options.occupancy:g}")


def _settings(options: Namespace) -> "Settings":
    """Return what the daemon would go by: the configuration, or the defaults."""
    from flexpiped.config_file import load_config
    from flexpiped.flexctl.offline_errors import offline_errors
    from flexpiped.settings import Settings

    with offline_errors():
        return load_config(Path(options.config)) if options.config else Settings()


def _scenario(options: Namespace, trace: "Trace") -> "Scenario":
    from flexpiped.flexctl.offline_errors import offline_errors
    from flexpiped.offline_plan import OfflineRequest
    from flexpiped.simulation.scenario import planned, published
    from planner.traces import workload_of

    with offline_errors():
        if options.model or options.topology or options.config:
            request = OfflineRequest(
                config=options.config or "", topology=options.topology or "", model=options.model or ""
            )
            return planned(request, workload=workload_of(trace), slo=slo_of(options), clock=time.monotonic)
        devices = options.devices or _DEVICES
        return published(
            devices=devices,
            hosts=min(options.hosts or _HOSTS, devices),
            occupancy=_OCCUPANCY if options.occupancy is None else options.occupancy,
            cluster=options.cluster or "",
            duration_s=trace[-1].arrival_s,
            seed=options.seed,
        )


def _system(options: Namespace, auto: "AutoSettings", scenario: "Scenario", trace: "Trace") -> "System":
    from flexpiped.auto import constants_of
    from planner.simulation.baselines import BestStatic, FastColdStart, Oracle, Static
    from planner.simulation.outlooks import Outlooks
    from planner.simulation.own_policy import Flexpiped
    from planner.traces import workload_of

    stages = options.stages or min(scenario.shapes)
    if stages not in scenario.shapes:
        known = ", ".join(map(str, sorted(scenario.shapes)))
        raise BadUsage("bad_input", f"--stages: {stages} is not among the granularities that there are: {known}")
    expected, outlooks = workload_of(trace), Outlooks(scenario.shapes, slo_of(options))
    most = options.replicas or max(1, len(scenario.devices) // min(scenario.shapes))
    match options.system:
        case "static":
            return Static(num_stages=stages, replicas=most)
        case "best-static":
            return BestStatic(outlooks=outlooks, expected=expected)
        case "cold-start":
            sequences = scenario.shapes[stages].times.kv_capacity_tokens / expected.sequence_tokens_mean
            return FastColdStart(num_stages=stages, per_replica=max(1.0, sequences / 2))
        case "oracle":
            return Oracle(outlooks=outlooks, expected=expected, arrivals_s=[each.arrival_s for each in trace])
        case _:
            most = options.replicas or (auto.max_replicas if options.config else most)
            constants = constants_of(replace(auto, min_replicas=min(auto.min_replicas, most), max_replicas=most))
            return Flexpiped(constants=constants, outlooks=outlooks, expected=expected)


def _tell(screen: Screen, options: Namespace, scenario: "Scenario", outcome: "Outcome", *, took_s: float) -> None:
    from flexpiped.flexctl.bench_lines import bench_lines
    from flexpiped.flexctl.simulate_lines import fleet_facts, fleet_lines, scenario_lines
    from flexpiped.simulation.report import report
    from flexpiped.simulation.scenario import describe

    lines = bench_lines(outcome.figures, slo_of(options), failures={}, paint=screen.paint)
    if options.html:
        facts = [("system", options.system), *describe(scenario).items(), *fleet_facts(outcome)]
        facts += [("requests", line) for line in lines]
        write_text(options.html, report(f"flexctl simulate: {options.system}", facts, outcome))
    if options.json:
        screen.write([json.dumps(_wire(outcome) | {"took_s": took_s, "scenario": describe(scenario)})])
        return
    ended = f"simulated {format_age(outcome.simulated_s)} in {took_s:.1f} s"
    screen.write([*scenario_lines(describe(scenario)), *lines, *fleet_lines(outcome), ended])
    if options.html:
        screen.write([f"report in {options.html}"])


def _wire(outcome: "Outcome") -> dict[str, Any]:
    fields = asdict(outcome)
    del fields["requests"]
    return fields | {"goodput_per_device_s": outcome.goodput_per_device_s, "utilisation": outcome.utilisation}
