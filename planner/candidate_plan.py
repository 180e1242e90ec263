"""What ``planner.planning`` answers: every candidate that was looked at, and the one that was chosen, with reasons."""

from dataclasses import dataclass
from enum import Enum

from planner.layout import Pipeline
from planner.prediction import PipelineTimes, Prediction
from planner.workload import Slo, Workload


class Verdict(Enum):
    CHOSEN = "chosen"
    LOST = "lost"  # it would do, but another one is better
    INFEASIBLE = "infeasible"  # proven: it cannot be placed
    TIMEOUT = "timeout"  # nothing was found in time, and nothing is proven


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of one stage on each of its devices, and what each of them has for it in all."""

    device_ids: tuple[str, ...]
    weight_bytes: int
    kv_bytes: int  # for the KV capacity of the plan
    workspace_bytes: int  # activations included
    usable_bytes: int
    kv_budget_bytes: int | None = None  # that the KV cache may take of each device; None: it has none of its own

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the later aims compare, summed over the replicas."""

    change_s: float
    fragmentation: int
    moved_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A candidate that can be placed.

    Attributes:
        pipelines: One for each replica, the best first; the others have what it leaves.
        kv_tokens: KV capacity of the smallest stage; as configured where the engine has it fixed.
        best_cv: At which this candidate does best against the others; None: it serves nothing in time.
        gap: How far the slowest stage may be from the best there is: 0 where that is proven.
        optimal: Every aim is proven.
        nested: The cuts are among those of all finer granularities.
        nested_loss: How much slower the slowest stage is with nested cuts than with free ones, as a share; None where
            there are no nested cuts for this number of stages, or none that fit.
        memory: Of the first pipeline, by stage.
        times: Of the first pipeline, for further predictions.
    """

    pipelines: tuple[Pipeline, ...]
    prediction: Prediction
    kv_tokens: int
    best_cv: float | None
    bottleneck_s: float
    gap: float
    optimal: bool
    nested: bool
    nested_loss: float | None
    costs: Costs
    memory: tuple[StageMemory, ...]
    times: PipelineTimes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidatePlan:
    """One number of stages and one tensor-parallel degree. ``reason``: why it was chosen, lost or cannot be."""

    num_stages: int
    degree: int
    verdict: Verdict
    reason: str
    found: Found | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAnswer:
    """Everything about a plan.

    Attributes:
        reason: One sentence: why this one, or why none.
        times_from: Whether the times are measured, and how well, or estimated.
    """

    candidates: tuple[CandidatePlan, ...]
    reason: str
    times_from: str
    workload: Workload
    slo: Slo

    @property
    def chosen(self) -> CandidatePlan | None:
        return next((each for each in self.candidates if each.verdict is Verdict.CHOSEN), None)
