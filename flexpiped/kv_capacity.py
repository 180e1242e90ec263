"""How large the KV cache of an engine with a server of its own is. Pure."""

from collections.abc import Sequence
from typing import Final

from flexpiped.config_values import Auto
from flexpiped.settings import ServedSettings
from topology.device import Device, DeviceKind
from topology.units import GIB

_AT_MOST_BYTES: Final = GIB
_SHARE_OF_CPU: Final = 2  # weights need room, too, where one device carries every layer


def served_kv_bytes(own: ServedSettings, devices: Sequence[Device]) -> int:
    """Return the bytes over all layers: as configured, else 1 GiB, and no more than half of what a CPU device may hold.

    A share of what is free on a GPU would be another size at each start.
    """
    if own.kv_cache_bytes is not Auto.AUTO:
        return own.kv_cache_bytes
    limits = [each.memory_total_bytes // _SHARE_OF_CPU for each in devices if each.kind is DeviceKind.CPU]
    return min([_AT_MOST_BYTES, *limits])
