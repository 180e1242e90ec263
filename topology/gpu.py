"""What is known of one GPU or MIG instance, in full; ``Device`` is the part that planning needs."""

from dataclasses import dataclass, field
from enum import Enum

from topology.device import Device, DeviceKind
from topology.states import Health


class MigMode(Enum):
    UNSUPPORTED = "unsupported"
    DISABLED = "disabled"
    ENABLED = "enabled"  # work goes to its instances, not to the GPU


class RemoteEnd(Enum):
    """What an NVLink lane leads to."""

    GPU = "gpu"
    SWITCH = "switch"
    CPU = "cpu"  # POWER and Grace hosts
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class NvLinkLane:
    """One active NVLink lane of a GPU."""

    lane: int
    version: int  # 0: the driver does not say
    remote: RemoteEnd
    remote_bus_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that holds memory of a GPU. ``used_bytes`` is None where the driver hides it (containers, WDDM)."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PcieInterface:
    """What a GPU's own PCIe port can do and does now. Idle GPUs lower the generation, so plan with the largest."""

    max_generation: int = 0
    max_width: int = 0
    current_generation: int = 0
    current_width: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRecord:
    """One GPU, or one MIG instance of one: identity is UUID and PCI bus id, never an index.

    Args:
        parent_uuid: The GPU whose instance this is; empty for a whole GPU.
        memory_reserved_bytes: Held by driver and firmware.
        memory_used_bytes: Held by processes, ours and others'.
        memory_own_bytes: The part of it that our own processes hold.
        memory_others_bytes: The part of it that other tenants' processes hold, seen or not.
        processes: Of other tenants, as far as the driver names them.
        utilisation: Share of time with work on the multiprocessors, 0 to 1.
        cpu_affinity: The nearest CPUs.
    """

    uuid: str
    pci_bus_id: str
    name: str
    memory_total_bytes: int
    parent_uuid: str = ""
    memory_reserved_bytes: int = 0
    memory_used_bytes: int = 0
    memory_own_bytes: int = 0
    memory_others_bytes: int = 0
    processes: tuple[GpuProcess, ...] = ()
    compute_capability: tuple[int, int] | None = None
    utilisation: float | None = None
    memory_utilisation: float | None = None
    numa_node: int | None = None
    cpu_affinity: tuple[int, ...] = ()
    mig_mode: MigMode = MigMode.UNSUPPORTED
    gpu_instance_id: int | None = None
    compute_instance_id: int | None = None
    pcie: PcieInterface = field(default_factory=PcieInterface)
    nvlink_lanes: tuple[NvLinkLane, ...] = ()
    health: Health = field(default_factory=Health)

    @property
    def is_mig_instance(self) -> bool:
        return bool(self.parent_uuid)

    @property
    def takes_work(self) -> bool:
        """Whether stages may be placed here: healthy, and not a GPU that is divided into instances."""
        return self.health.is_usable and self.mig_mode is not MigMode.ENABLED and self.memory_total_bytes > 0


def device_of(gpu: GpuRecord, *, host_id: str) -> Device:
    """Return the device that planning sees."""
    total = gpu.memory_total_bytes
    reserved = min(total, gpu.memory_reserved_bytes + max(0, gpu.memory_used_bytes - gpu.memory_own_bytes))
    return Device(
        id=gpu.uuid,
        kind=DeviceKind.CUDA,
        memory_total_bytes=total,
        memory_reserved_bytes=reserved,
        memory_others_bytes=min(reserved, gpu.memory_others_bytes),
        name=gpu.name,
        host_id=host_id,
        pci_bus_id=gpu.pci_bus_id,
        numa_node=gpu.numa_node,
    )
