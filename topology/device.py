"""Devices, as the rest of flexpiped sees them."""

from dataclasses import dataclass
from enum import Enum


class DeviceKind(Enum):
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One place that can hold a stage: a GPU, a MIG instance, or a share of a host without GPUs.

    ``id`` is stable: the UUID of a GPU or MIG instance, ``cpu:N`` for a CPU device. It is never an enumeration index of
    CUDA or NVML. Within a cluster ids are unique: those of CPU devices are prefixed by their host there.
    """

    id: str
    kind: DeviceKind
    memory_total_bytes: int
    memory_reserved_bytes: int = 0  # driver, context, other tenants
    name: str = ""  # the product
    host_id: str = ""
    pci_bus_id: str = ""
    numa_node: int | None = None
    memory_others_bytes: int = 0  # the part of what is reserved that other tenants' processes hold
    threads: int = 0  # CPU devices: threads that it may use; 0: not said

    def __post_init__(self) -> None:
        if not 0 <= self.memory_reserved_bytes <= self.memory_total_bytes:
            raise ValueError(f"{self.id}: {self.memory_reserved_bytes} of {self.memory_total_bytes} bytes reserved")
        if not 0 <= self.memory_others_bytes <= self.memory_reserved_bytes:
            raise ValueError(
                f"{self.id}: others hold {self.memory_others_bytes} of {self.memory_reserved_bytes} reserved bytes"
            )
        if self.threads < 0:
            raise ValueError(f"{self.id}: {self.threads} threads")

    @property
    def memory_usable_bytes(self) -> int:
        return self.memory_total_bytes - self.memory_reserved_bytes

    @property
    def is_shared(self) -> bool:
        """Whether processes of other tenants hold memory here."""
        return self.memory_others_bytes > 0


def cpu_devices(*, count: int, memory_bytes: int, threads: int = 0, host_id: str = "") -> tuple[Device, ...]:
    """Return ``count`` CPU devices ``cpu:0`` .. with a memory budget of ``memory_bytes`` and ``threads`` each."""
    if count < 1:
        raise ValueError(f"at least one device is needed, not {count}")
    return tuple(
        Device(
            id=f"cpu:{index}",
            kind=DeviceKind.CPU,
            memory_total_bytes=memory_bytes,
            host_id=host_id,
            threads=threads,
        )
        for index in range(count)
    )
