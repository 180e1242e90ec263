"""The systems of FlexPipe's evaluation as the simulator has them, and the constants of ours that are tuned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from planner.policy_state import PolicyConstants
from planner.simulation.baselines import FastColdStart, Full, Oracle, Static
from planner.simulation.outcome import Outcome
from planner.simulation.outlooks import Outlooks
from planner.simulation.own_policy import Flexpiped
from planner.simulation.pool import DevicePool
from planner.simulation.run import Setting, simulate
from planner.simulation.shape import Shapes
from planner.simulation.system import System
from planner.simulation.variants import multiplexed, sharing_tensors
from planner.traces import Trace, workload_of
from planner.workload import Slo, Workload

_FEWEST = 4  # stages: what the static and the serverless systems have in the paper
_OVERLAP = 0.5  # of a prompt's time that MuxServe hides: half of the SMs, as decoding leaves them
_INSTANCES = 2  # that share tensors: MuxServe's and Tetris's figures are with two to four
MOST_REPLICAS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What systems are made from: the half that they may tune on, and what comes, which only the oracle sees."""

    tuning: Trace
    coming: Trace
    devices: Callable[[], DevicePool]
    slo: Slo

    @property
    def expected(self) -> Workload:
        return workload_of(self.tuning)

    def run(self, system: System, shapes: Shapes, trace: Trace) -> Outcome:
        """Return what a system comes to on a trace."""
        setting = Setting(trace=trace, shapes=shapes, slo=self.slo, expected=self.expected)
        return simulate(setting, self.devices(), system)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A system: its shapes, and how it is made."""

    name: str
    source: str
    shapes: Shapes
    make: Callable[[Given], System]


def own(shapes: Shapes, slo: Slo, constants: PolicyConstants) -> Contestant:
    """Return flexpiped."""
    outlooks = Outlooks(shapes, slo)
    return Contestant(
        name="flexpiped",
        source="planner.policy",
        shapes=shapes,
        make=lambda given: Flexpiped(constants=constants, outlooks=outlooks, expected=given.expected),
    )


def others(shapes: Shapes, slo: Slo) -> list[Contestant]:
    """Return what it is compared with."""
    mux = {stages: replace(each, times=multiplexed(each.times, overlap=_OVERLAP)) for stages, each in shapes.items()}
    tensors = {
        stages: replace(
            each,
            times=replace(
                sharing_tensors(each.times, instances=_INSTANCES), max_sequences=_INSTANCES * each.times.max_sequences
            ),
        )
        for stages, each in shapes.items()
    }
    few = shapes[_FEWEST]

    def cold_start(given: Given) -> System:
        sequences = min(few.times.max_sequences, few.times.kv_capacity_tokens / given.expected.sequence_tokens_mean)
        return FastColdStart(num_stages=_FEWEST, per_replica=max(1.0, sequences / 2))

    return [
        Contestant(
            name="AlpaServe-like",
            source="Li et al., OSDI 2023: the static placement that did best in a simulation of the first half",
            shapes=shapes,
            make=lambda given: best_static(given, shapes),
        ),
        Contestant(
            name="MuxServe-like",
            source="Duan et al., ICML 2024: prompts and decoding share SMs; placed likewise",
            shapes=mux,
            make=lambda given: best_static(given, mux),
        ),
        Contestant(
            name="ServerlessLLM-like",
            source="Fu et al., OSDI 2024: whole replicas, cold starts 6 times as fast",
            shapes=shapes,
            make=cold_start,
        ),
        Contestant(
            name="Tetris-like",
            source="Li et al., ATC 2022: two instances share one copy of the tensors; placed likewise",
            shapes=tensors,
            make=lambda given: best_static(given, tensors),
        ),
        Contestant(
            name="static 4 stages",
            source="as many replicas as there is room for, always on",
            shapes=shapes,
            make=lambda _given: Static(num_stages=_FEWEST, replicas=MOST_REPLICAS),
        ),
        Contestant(
            name="oracle",
            source="the best of seven plans by what came of each, three of which change as they know what comes",
            shapes=shapes,
            make=lambda given: _oracle(given, shapes, Outlooks(shapes, slo)),
        ),
    ]


def best_static(given: Given, shapes: Shapes) -> System:
    """Return as many replicas as fit of the granularity that has most requests of the first half in time.

    AlpaServe searches placements by simulating the workload that is expected, too. Of equals the one of least latency.
    """

    def made(stages: int) -> System:
        return Static(num_stages=stages, replicas=MOST_REPLICAS)

    tried = {stages: given.run(made(stages), shapes, given.tuning) for stages in shapes}
    return made(max(tried, key=lambda stages: _merit(tried[stages])))


def _merit(found: Outcome) -> tuple[float, float]:
    return round(found.figures.attainment, 3), -(found.figures.latency_s.mean or inf)


def _oracle(given: Given, shapes: Shapes, outlooks: Outlooks) -> System:
    arrivals_s = [each.arrival_s for each in given.coming]

    def seeing(load: float) -> System:
        return Oracle(outlooks=outlooks, expected=given.expected, arrivals_s=arrivals_s, load=load)

    plans: list[Callable[[], System]] = [partial(seeing, load) for load in (0.4, 0.55, 0.7)]
    plans += [partial(Full, num_stages=stages) for stages in shapes]
    return max(plans, key=lambda plan: _merit(given.run(plan(), shapes, given.coming)))()


def settings_tried() -> Sequence[PolicyConstants]:
    """Return the constants among which tuning chooses: the daemon's defaults come first."""
    base = PolicyConstants(min_replicas=1, max_replicas=MOST_REPLICAS)
    return (
        base,
        replace(base, reclaim_s=120.0),
        replace(base, late_share=0.02),
        replace(base, late_share=0.02, reclaim_s=120.0),
        replace(base, target_load=0.65, load_limit=0.8),
    )
