"""The systems of FlexPipe's evaluation as the simulator has them, and the constants of ours that are tuned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from planner.granularity import ScoreConstants
from planner.policy_state import PolicyConstants
from planner.simulation.baselines import BestStatic, FastColdStart, Oracle, Static
from planner.simulation.outlooks import Outlooks
from planner.simulation.own_policy import Flexpiped
from planner.simulation.shape import Shapes
from planner.simulation.system import System
from planner.simulation.variants import multiplexed, sharing_tensors
from planner.traces import Trace
from planner.workload import Slo, Workload

_FEWEST = 4  # stages: what the static and the serverless systems have in the paper
_OVERLAP = 0.5  # of a prompt's time that MuxServe hides: half of the SMs, as decoding leaves them
_INSTANCES = 2  # that share tensors: MuxServe's and Tetris's figures are with two to four
MOST_REPLICAS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A system: its shapes, and how it is made for traffic that is expected and for the trace that comes."""

    name: str
    source: str
    shapes: Shapes
    make: Callable[[Workload, Trace], System]


def own(shapes: Shapes, slo: Slo, constants: PolicyConstants) -> Contestant:
    """Return flexpiped."""
    outlooks = Outlooks(shapes, slo)
    return Contestant(
        name="flexpiped",
        source="planner.policy",
        shapes=shapes,
        make=lambda expected, _trace: Flexpiped(constants=constants, outlooks=outlooks, expected=expected),
    )


def others(shapes: Shapes, slo: Slo) -> list[Contestant]:
    """Return what it is compared with."""
    plain = Outlooks(shapes, slo)
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
    mux_outlooks, tensor_outlooks = Outlooks(mux, slo), Outlooks(tensors, slo)
    few = shapes[_FEWEST]

    def cold_start(expected: Workload, _trace: Trace) -> System:
        sequences = min(few.times.max_sequences, few.times.kv_capacity_tokens / expected.sequence_tokens_mean)
        return FastColdStart(num_stages=_FEWEST, per_replica=max(1.0, sequences / 2))

    return [
        Contestant(
            name="AlpaServe-like",
            source="Li et al., OSDI 2023: the static placement predicted best",
            shapes=shapes,
            make=lambda expected, _trace: BestStatic(outlooks=plain, expected=expected),
        ),
        Contestant(
            name="MuxServe-like",
            source="Duan et al., ICML 2024: prompts and decoding share SMs",
            shapes=mux,
            make=lambda expected, _trace: BestStatic(outlooks=mux_outlooks, expected=expected),
        ),
        Contestant(
            name="ServerlessLLM-like",
            source="Fu et al., OSDI 2024: whole replicas, cold starts 6 times as fast",
            shapes=shapes,
            make=cold_start,
        ),
        Contestant(
            name="Tetris-like",
            source="Li et al., ATC 2022: two instances share one copy of the tensors",
            shapes=tensors,
            make=lambda expected, _trace: BestStatic(outlooks=tensor_outlooks, expected=expected),
        ),
        Contestant(
            name="static 4 stages",
            source="as many replicas as there is room for, always on",
            shapes=shapes,
            make=lambda _expected, _trace: Static(num_stages=_FEWEST, replicas=MOST_REPLICAS),
        ),
        Contestant(
            name="oracle",
            source="knows all arrivals, changes for nothing",
            shapes=shapes,
            make=lambda expected, trace: Oracle(
                outlooks=plain, expected=expected, arrivals_s=[each.arrival_s for each in trace]
            ),
        ),
    ]


def settings_tried() -> Sequence[PolicyConstants]:
    """Return the constants among which tuning chooses: the daemon's defaults come first."""
    base = PolicyConstants(min_replicas=1, max_replicas=MOST_REPLICAS)
    return (
        base,
        replace(base, target_load=0.6, load_limit=0.75),
        replace(base, target_load=0.6, load_limit=0.75, reclaim_s=60.0),
        replace(base, reclaim_s=60.0, score=ScoreConstants(alpha=0.2)),
    )
