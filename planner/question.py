"""What ``planner.planning`` is asked: a model on devices under a workload, and what the engine can carry out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.kv_capacity import KvPerDevice
from planner.layer_costs import LayerCosts
from planner.layout import Pipeline
from planner.model_graph import ModelGraph
from planner.workload import Slo, Workload
from topology.cluster import ClusterTopology
from topology.topology import HostTopology


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What the engine that will run the plan can do.

    Attributes:
        degrees: Tensor-parallel degrees that it takes.
        max_sequences: That it runs at once.
        max_step_tokens: That it computes in one step of a micro-batch; longer prompts run in chunks.
        micro_batches: In flight at once; 0: one for each stage.
        kv_tokens: KV capacity that it is configured to have; None: whatever fits.
        kv_per_device: Each device with a stage has so much for its KV cache; ``kv_tokens`` is None then.
        resident: Device groups of ranks that run already, in their order; empty: any device may carry any stage.
        stages_reason: Why ``max_stages``, where it is the engine that sets a limit and not the number of devices.
    """

    max_stages: int
    degrees: tuple[int, ...] = (1,)
    max_sequences: int = 64
    max_step_tokens: int = 512
    micro_batches: int = 0
    kv_tokens: int | None = None
    kv_per_device: KvPerDevice | None = None
    resident: tuple[tuple[str, ...], ...] = ()
    stages_reason: str = ""

    def __post_init__(self) -> None:
        if min(self.max_stages, self.max_sequences, self.max_step_tokens, *self.degrees) < 1 or not self.degrees:
            raise ValueError(f"impossible limits of an engine: {self}")
        if self.kv_tokens is not None and self.kv_per_device is not None:
            raise ValueError("a KV cache is of one size, or as large as its devices let it be")

    @property
    def is_kv_reserved(self) -> bool:
        """Whether the KV cache is of a configured size, which each layer has in full."""
        return self.kv_tokens is not None or self.kv_per_device is not None

    @property
    def kv_device_bytes(self) -> int:
        """What a device has for its KV cache, whatever its layers are; 0: it goes by its layers."""
        return 0 if self.kv_per_device is None else self.kv_per_device.device_bytes

    def kv_tokens_of(self, graph: ModelGraph, pipeline: Pipeline) -> int | None:
        """Return the KV capacity that a pipeline is configured to have; None: whatever fits."""
        return self.kv_tokens if self.kv_per_device is None else self.kv_per_device.tokens(graph, pipeline)

    def refusal_of(self, num_stages: int) -> str:
        """Say why the engine does not run so many stages; empty where it may."""
        return self.stages_reason if num_stages > self.max_stages else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragmentation:
    """Points for touching a device, compared with each other only: less is better.

    Attributes:
        whole_device: A GPU that nobody uses yet.
        whole_island: An NVLink island of which nobody uses a device yet.
        shared, shared_per_cv2: A device that other tenants use: ``shared * (1 + shared_per_cv2 * CV^2)``, so in calm
            traffic a leftover is better than a whole GPU, and in bursts (CV 3 and above) it is not.
        scaled_path: A device that holds nothing yet, for each mark of recent scaling on the path to it: the links above
            it are still loading for others. With this value a whole GPU elsewhere is better than a leftover there.

    Source: FlexPipe, Eq 9, which gives no values for its gamma0 and alpha, and its hierarchical resource graph.
    """

    whole_device: int = 400
    whole_island: int = 800
    shared: int = 100
    shared_per_cv2: float = 0.35
    scaled_path: int = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanQuestion:
    """A question to the planner.

    Attributes:
        costs_beside: Times of stages that compute beside others on their host; None: as alone.
        num_stages: None: whatever serves the workload best.
        current: The layout in force, whose memory is held until a handover retires it.
        shares_current: The engine in force is to change; else a second instance beside it shares nothing.
        scaling: Marks of recent scaling on the path to a device, by its id (``ResourceGraph.heats``); 0 where absent.
        max_replicas: How many pipelines the plan may have.
        cores: CPU threads that all stages on a host without GPUs share; None: each device computes by itself.
        threads_per_device: Of them, what a stage has at most, so that fewer stages do not compute on all; 0: a single
            stage has them all.
        nested_loss: How much slower the slowest stage may be, as a share, for cuts that are nested in those of finer
            granularities; where nested cuts lose more, free ones are taken.
        headroom: Share of a device's usable memory that is left free.
        risk_s: What it costs to touch a stage in a change at all, beside the seconds of its bytes.
    """

    graph: ModelGraph
    costs: LayerCosts
    topology: HostTopology | ClusterTopology
    engine: EngineLimits
    costs_beside: LayerCosts | None = None
    workload: Workload = field(default_factory=Workload)
    slo: Slo = field(default_factory=Slo)
    num_stages: int | None = None
    current: Pipeline | None = None
    shares_current: bool = True
    scaling: Mapping[str, float] = field(default_factory=dict)
    max_replicas: int = 1
    cores: int | None = None
    threads_per_device: int = 0
    nested_loss: float = 0.05
    headroom: float = 0.0
    risk_s: float = 0.001
    fragmentation: Fragmentation = field(default_factory=Fragmentation)
    deadline_s: float = 5.0

    def __post_init__(self) -> None:
        if self.num_stages is not None and self.num_stages < 1:
            raise ValueError(f"a pipeline has at least one stage, not {self.num_stages}")
        if (
            self.max_replicas < 1
            or self.deadline_s <= 0
            or not 0 <= self.headroom < 1
            or min(self.risk_s, self.nested_loss) < 0
        ):
            raise ValueError("an impossible number of replicas, deadline, headroom, loss or risk")

    @property
    def sequence_tokens(self) -> int:
        """A sequence at its end, in the mean."""
        return max(1, round(self.workload.sequence_tokens_mean))
