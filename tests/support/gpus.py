"""The GPUs of this machine, for tests and benchmarks that need some."""

from topology.device import DeviceKind
from topology.discovery import discover


def gpus() -> tuple[str, ...]:
    """Return the UUIDs of the GPUs that take work."""
    return tuple(device.id for device in discover().devices if device.kind is DeviceKind.CUDA)
