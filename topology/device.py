"""Devices and hosts, as the rest of flexpiped sees them."""

from dataclasses import dataclass
from enum import Enum


class DeviceKind(Enum):
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One place that can hold a stage: a GPU, a MIG instance, or a share of a host without GPUs.

    ``id`` is stable: the UUID of a GPU, ``cpu:N`` for a CPU device. It is never an enumeration index of CUDA or NVML.
    """

    id: str
    kind: DeviceKind
    memory_total_bytes: int
    memory_reserved_bytes: int = 0  # driver, context, other tenants

    def __post_init__(self) -> None:
        if not 0 <= self.memory_reserved_bytes <= self.memory_total_bytes:
            raise ValueError(f"{self.id}: {self.memory_reserved_bytes} of {self.memory_total_bytes} bytes reserved")

    @property
    def memory_usable_bytes(self) -> int:
        return self.memory_total_bytes - self.memory_reserved_bytes


def cpu_devices(*, count: int, memory_bytes: int) -> tuple[Device, ...]:
    """Return ``count`` CPU devices ``cpu:0`` .. with a memory budget of ``memory_bytes`` each."""
    if count < 1:
        raise ValueError(f"at least one device is needed, not {count}")
    return tuple(
        Device(id=f"cpu:{index}", kind=DeviceKind.CPU, memory_total_bytes=memory_bytes) for index in range(count)
    )
