"""How large the KV cache of an engine is configured to be. Pure."""

from collections.abc import Sequence
from typing import Final

from flexpiped.config_values import Auto
from flexpiped.settings import NativeSettings, ServedSettings
from planner.kv_capacity import KvInAll, KvPerDevice, KvSize
from topology.device import Device, DeviceKind
from topology.units import GIB

_AT_MOST_BYTES: Final = GIB
_SHARE_OF_CPU: Final = 2  # weights need room, too, where one device carries every layer


def native_kv_size(own: NativeSettings) -> KvSize:
    """Return the size of the native engine's: so much on each device where that is configured, else in all."""
    if own.kv_cache_per_device_bytes is Auto.AUTO:
        return KvInAll(total_bytes=own.kv_cache_bytes, block_tokens=own.kv_block_tokens)
    return KvPerDevice(device_bytes=own.kv_cache_per_device_bytes, block_tokens=own.kv_block_tokens)


def served_kv_bytes(own: ServedSettings, devices: Sequence[Device]) -> int:
    """Return the bytes over all layers: as configured, else 1 GiB, and no more than half of what a CPU device may hold.

    A share of what is free on a GPU would be another size at each start.
    """
    if own.kv_cache_bytes is not Auto.AUTO:
        return own.kv_cache_bytes
    limits = [each.memory_total_bytes // _SHARE_OF_CPU for each in devices if each.kind is DeviceKind.CPU]
    return min([_AT_MOST_BYTES, *limits])
