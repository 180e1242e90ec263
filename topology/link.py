"""What joins two devices, in the words of ``nvidia-smi topo -m``."""

from dataclasses import dataclass
from enum import Enum
from typing import Final


class LinkKind(Enum):
    """Ways between two devices, from the nearest to the farthest."""

    SAME_DEVICE = "same-device"
    NVLINK = "nvlink"  # lanes between the two GPUs
    NVSWITCH = "nvswitch"  # lanes of both into the same switches
    PIX = "pix"  # at most one PCIe bridge
    PXB = "pxb"  # several PCIe bridges, without the host bridge
    PHB = "phb"  # through a PCIe host bridge (the CPU)
    NODE = "node"  # through several host bridges of one NUMA node
    SYS = "sys"  # from one NUMA node to another
    SHARED_MEMORY = "shared-memory"  # between CPU devices of one host
    NETWORK = "network"  # between hosts


_ORDER: Final = {kind: place for place, kind in enumerate(LinkKind)}


class P2P(Enum):
    """Whether one GPU reaches the memory of the other by itself, as NVML says."""

    UNKNOWN = "unknown"
    OK = "ok"
    CHIPSET_NOT_SUPPORTED = "chipset-not-supported"
    GPU_NOT_SUPPORTED = "gpu-not-supported"
    TOPOLOGY_NOT_SUPPORTED = "topology-not-supported"
    DISABLED_BY_REGISTRY = "disabled-by-registry"
    NOT_SUPPORTED = "not-supported"

    @property
    def is_refused(self) -> bool:
        return self not in (P2P.UNKNOWN, P2P.OK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What carries bytes from one device to another.

    Args:
        bandwidth_bytes_per_s: What a large copy gets, one way.
        latency_s: What a copy of a few bytes takes.
        is_measured: Both were measured on these devices; else they are the figures of ``link_figures``.
        peak_bytes_per_s: Published rate of the wires, one way; 0: not known.
        lanes: NVLink lanes; 0 for other kinds.
        generation: Of NVLink or PCIe, the lowest on the way; 0: not known.
        width: PCIe lanes, the fewest on the way; 0: not known.
    """

    kind: LinkKind
    bandwidth_bytes_per_s: float
    latency_s: float
    is_measured: bool = False
    peak_bytes_per_s: float = 0.0
    lanes: int = 0
    generation: int = 0
    width: int = 0
    p2p: P2P = P2P.UNKNOWN

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth_bytes_per_s < float("inf"):
            raise ValueError(f"{self.kind.value}: bandwidth of {self.bandwidth_bytes_per_s} bytes/s")
        if not 0 <= self.latency_s < float("inf"):
            raise ValueError(f"{self.kind.value}: latency of {self.latency_s} s")
        if not 0 <= self.peak_bytes_per_s < float("inf") or min(self.lanes, self.generation, self.width) < 0:
            raise ValueError(f"{self.kind.value}: a negative figure")

    @property
    def is_nvlink(self) -> bool:
        """Whether the two devices are in one NVLink island."""
        return self.kind in (LinkKind.NVLINK, LinkKind.NVSWITCH)

    def seconds_for(self, size_bytes: float) -> float:
        """Return how long ``size_bytes`` take, in seconds."""
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s


def nearness(link: Link) -> tuple[int, float, float]:
    """Return a sort key: the nearer and faster link first."""
    return _ORDER[link.kind], -link.bandwidth_bytes_per_s, link.latency_s
