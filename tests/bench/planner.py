"""Figures of the placement solver: ``python -m tests.bench.planner``; see ``tests/bench/README.md``."""

import argparse
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

from planner.budget import Budget
from planner.checker import check
from planner.placement import Placement
from planner.placement_problem import PlacementProblem
from planner.placement_solver import place
from planner.replanner import QUICK_S, Replanner
from tests.bench.openb import at_load, data_folder, replayed
from tests.bench.pipelines_that_fit import pipelines_that_fit
from tests.bench.placement_instances import LLAMA_70B, MIN_KV_TOKENS, OPT_66B, partly_used_hosts, placement
from tests.bench.placement_rivals import CONTEXT_TOKENS, RIVALS, throughput
from tests.bench.stats import median
from tests.bench.tables import Bound, say, table, verdicts, write_json


def _solve(problem: PlacementProblem, *, limit_s: float) -> tuple[Placement, float]:
    """Return a checked placement and the CPU seconds it took (one thread, so the same as wall time when alone)."""
    began_s = time.process_time()
    found = place(problem, budget=Budget(limit_s=limit_s, clock=time.process_time))
    took_s = time.process_time() - began_s
    broken = check(problem, found)
    assert broken == (), broken
    return found, took_s


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def scale(count: int, figures: dict[str, object]) -> list[Bound]:
    """80 uneven layers, 16 stages, 82 partly used GPUs on 42 hosts, with one second and with ten."""
    rows, bounds = [], []
    for scarce in (False, True):
        for limit_s in (1.0, 10.0):
            found = [_solve(partly_used_hosts(seed, scarce=scarce), limit_s=limit_s) for seed in range(count)]
            gaps = [plan.proofs[0].gap * 100 for plan, _ in found]
            kv_gaps = [plan.proofs[1].gap * 100 for plan, _ in found]
            seconds = [took_s for _, took_s in found]
            what = "few fast GPUs" if scarce else "many fast GPUs"
            proven = sum(gap == 0 for gap in gaps)
            rows.append(
                [
                    f"{what}, {limit_s:g} s allowed",
                    f"{median(seconds):.2f}",
                    f"{max(seconds):.2f}",
                    f"{median(plan.proofs[0].value for plan, _ in found) / 1e6:.3f}",
                    f"{median(plan.proofs[0].bound for plan, _ in found) / 1e6:.3f}",
                    f"{max(gaps):.2f}",
                    f"{proven}/{count}",
                    f"{median(kv_gaps):.2f}",
                ]
            )
            limit = 3.0 if limit_s == 1.0 else 0.0
            bounds.append(
                Bound(
                    what=f"gap of the bottleneck, {rows[-1][0]}", value=max(gaps), limit=limit, at_most=True, unit="%"
                )
            )
            figures[rows[-1][0]] = {"seconds": seconds, "gaps": gaps, "kv_gaps": kv_gaps}
            say(f"{rows[-1][0]}: {rows[-1][1:]}")
    head = ["s: median", "max", "bottleneck ms", "bound ms", "largest gap %", "proven", "KV gap %"]
    table("80 uneven layers, 16 stages, 82 partly used GPUs on 42 hosts", ["", *head], rows)
    return bounds


def replan(count: int, figures: dict[str, object]) -> list[Bound]:
    """The same, with a pipeline in place, after one of its devices is gone: a session against a solve of its own."""
    rows, bounds = [], []
    for scarce in (False, True):
        seconds, gaps, kv_gaps, fresh_gaps, worse = [], [], [], [], []
        for seed in range(count):
            problem = partly_used_hosts(seed, scarce=scarce)
            session = Replanner()
            first = session.place(problem, budget=Budget(limit_s=1.0, clock=time.process_time))
            changed = _without_one(problem, first, lost=first.stages[seed % len(first.stages)].place)
            began_s = time.process_time()
            again = session.place(changed, budget=Budget(limit_s=QUICK_S, clock=time.process_time))
            seconds.append(time.process_time() - began_s)
            assert check(changed, again) == ()
            fresh, _ = _solve(changed, limit_s=1.0)
            gaps.append(again.proofs[0].gap * 100)
            kv_gaps.append(again.proofs[1].gap * 100)
            fresh_gaps.append(fresh.proofs[0].gap * 100)
            worse.append(again.scores.bottleneck_ns / fresh.scores.bottleneck_ns)
        what = "few fast GPUs" if scarce else "many fast GPUs"
        times = [f"{median(seconds) * 1e3:.0f}", f"{max(seconds) * 1e3:.0f}"]
        found = [f"{median(gaps):.2f}", f"{max(gaps):.2f}", f"{median(fresh_gaps):.2f}", f"{max(fresh_gaps):.2f}"]
        rows.append([what, *times, *found, f"{median(worse):.3f}", f"{max(worse):.3f}", f"{median(kv_gaps):.0f}"])
        figures[f"replan, {what}"] = {"seconds": seconds, "gaps": gaps, "fresh_gaps": fresh_gaps, "worse": worse}
        bounds += [
            Bound(what=f"replanning, slowest, {what}", value=max(seconds) * 1e3, limit=100, at_most=True, unit="ms"),
            Bound(what=f"bottleneck / fresh, median, {what}", value=median(worse), limit=1.01, at_most=True),
        ]
    head = [
        "ms: median",
        "max",
        "gap %",
        "largest",
        "fresh gap %",
        "largest",
        "bottleneck / fresh",
        "largest",
        "KV gap %",
    ]
    table("replanning after one device is gone, against a fresh second", ["", *head], rows)
    return bounds


def _without_one(problem: PlacementProblem, first: Placement, *, lost: int) -> PlacementProblem:
    sizes = [piece.weight_bytes for piece in problem.pieces]
    held = {stage.place: {p: sizes[p] for p in range(stage.first, stage.end)} for stage in first.stages}
    places = []
    for index, found in enumerate(problem.places):
        here = {} if index == lost else held.get(index, {})
        free = 0 if index == lost else found.free_bytes - sum(here.values())
        places.append(replace(found, held=here, free_bytes=free))
    return replace(problem, places=tuple(places))


def cluster(folder: Path, figures: dict[str, object]) -> list[Bound]:
    """The whole openb cluster, as its trace leaves it at its peak and at two loads."""
    rows, slowest = [], 0.0
    states = [("peak of the trace", replayed(folder)), *((f"{x:.0%}", at_load(folder, x)) for x in (0.8, 0.95))]
    for what, nodes in states:
        for model in (OPT_66B, LLAMA_70B):
            problem = placement(nodes, model.pieces(1), stages=16, min_kv_tokens=MIN_KV_TOKENS)
            found, took_s = _solve(problem, limit_s=4.0)
            slowest = max(slowest, took_s)
            gaps = [f"{proof.gap * 100:.2f}" for proof in found.proofs[:2]]
            rows.append([f"{model.name}, {what}", str(len(problem.places)), f"{took_s:.2f}", *gaps])
            say(f"openb: {rows[-1]}")
    for row in rows:
        row.append(f"{_peak_mib():.0f}")
    head = ["", "GPUs with room", "s", "gap of the bottleneck %", "of the KV capacity %", "peak MiB"]
    table("16 stages on openb: 1,213 nodes, 6,212 GPUs", head, rows)
    figures["openb"] = rows
    return [Bound(what="openb, slowest", value=slowest, limit=5.0, at_most=True, unit="s")]


def rivals(count: int, figures: dict[str, object]) -> list[Bound]:
    """What people do today on the same instances: ratios to the solver's plan, medians over what fits at all."""
    rows, bounds = [], []
    for scarce, requests in ((False, 32), (False, 128), (True, 32), (True, 128)):
        found = [partly_used_hosts(seed, scarce=scarce) for seed in range(count)]
        problems = [replace(problem, min_kv_tokens=requests * CONTEXT_TOKENS) for problem in found]
        ours = [_solve(problem, limit_s=2.0)[0].scores for problem in problems]
        for name, rival in RIVALS.items():
            theirs = [rival(replace(problem, min_kv_tokens=0)) for problem in problems]  # any KV capacity will do
            pairs = [(mine, other) for mine, other in zip(ours, theirs, strict=True) if other is not None]
            slower = median(other.bottleneck_ns / mine.bottleneck_ns for mine, other in pairs)
            smaller = median(other.kv_tokens / mine.kv_tokens for mine, other in pairs)
            less = median(
                throughput(other, requests=requests) / throughput(mine, requests=requests) for mine, other in pairs
            )
            cells = [f"{ratio:.2f}x" if pairs else "-" for ratio in (slower, smaller, less)]
            where = f"{'few' if scarce else 'many'} fast GPUs, {requests} requests"
            rows.append([f"{name}, {where}", f"{len(pairs)}/{count}", *cells])
            bounds.append(Bound(what=f"throughput, {name}, {where}", value=less, limit=1.0, at_most=True))
    table(
        "what people do today, against the solver (medians where it fits)",
        ["", "fits", "bottleneck", "smallest KV capacity", "predicted throughput"],
        rows,
    )
    figures["rivals"] = rows
    return bounds


def fragmentation(folder: Path, figures: dict[str, object], *, most: int) -> None:
    """How many pipelines fit on openb, one after the other, by stages or by whole GPUs of one node."""
    rows = []
    for load in (0.5, 0.7, 0.8, 0.9, 0.95):
        nodes = at_load(folder, load)
        for model in (OPT_66B, LLAMA_70B):
            rows.append([f"{model.name}, {load:.0%} in use", *pipelines_that_fit(nodes, model, most=most)])
            say(f"fragmentation: {rows[-1]}")
    head = ["", "32 stages", "16 stages", "8 stages", "4 stages", "8 whole GPUs", "4 whole GPUs"]
    table(f"pipelines that fit on openb (counted up to {most})", head, rows)
    figures["fragmentation"] = rows


def main() -> int:
    """Run what was asked for; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--most", type=int, default=2000, help="pipelines counted at most")
    parser.add_argument("--only", choices=["scale", "replan", "openb", "rivals", "fragmentation"])
    parser.add_argument("--short", action="store_true", help="only prove that it works")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    count, most = (2, 4) if args.short else (args.instances, args.most)
    figures: dict[str, object] = {}
    bounds: list[Bound] = []

    def wanted(name: str) -> bool:
        return args.only in (None, name)

    bounds += scale(count, figures) if wanted("scale") else []
    bounds += replan(count, figures) if wanted("replan") else []
    bounds += rivals(count, figures) if wanted("rivals") else []
    folder = data_folder()
    if folder is None:
        say(f"left out: openb and fragmentation (FLEXPIPED_CLUSTER_DATA={os.environ.get('FLEXPIPED_CLUSTER_DATA')!r})")
    else:
        bounds += cluster(folder, figures) if wanted("openb") else []
        if wanted("fragmentation"):
            fragmentation(folder, figures, most=most)
    verdicts(bounds)
    write_json(args.json, figures, bounds)
    return int(any(bound.holds is False for bound in bounds))


if __name__ == "__main__":
    sys.exit(main())
