"""What the planner is asked and what it answers. Plain values, filled by ``planner.even_pipeline``."""

from dataclasses import dataclass

from planner.layout import Pipeline
from planner.model_graph import ModelGraph
from topology.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """A question to the planner. Devices stand in the order in which they are preferred, all else being equal.

    ``fixed_order``: the devices are the ranks of an engine that runs already. Stages follow their order, the first
    stage is on the first and the last stage on the last device, and devices between may be left out.
    """

    graph: ModelGraph
    devices: tuple[Device, ...]
    num_stages: int | None = None  # None: auto
    kv_bytes_per_decoder: int = 0  # KV capacity that each decoder must have
    workspace_bytes: int = 0  # once per device that carries a stage
    current: Pipeline | None = None  # the layout in force, whose memory is held until the handover retires it
    fixed_order: bool = False
    deadline_s: float = 5.0

    def __post_init__(self) -> None:
        if self.num_stages is not None and self.num_stages < 1:
            raise ValueError(f"a pipeline has at least one stage, not {self.num_stages}")
        if self.kv_bytes_per_decoder < 0 or self.workspace_bytes < 0 or self.deadline_s <= 0:
            raise ValueError("bytes must not be negative and the deadline must be above 0 s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A layout with the reasons for it. ``stage_bytes`` is weights, KV capacity and workspace of each stage."""

    pipeline: Pipeline
    reasons: tuple[str, ...]  # sentences for people, the most important first
    stage_bytes: tuple[int, ...]
    optimal: bool  # proven; else the best that was found before the deadline
