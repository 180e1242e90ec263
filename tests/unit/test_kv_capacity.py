"""How large a KV cache is where the configuration does not say."""

from flexpiped.kv_capacity import served_kv_bytes
from flexpiped.settings import SglangSettings, VllmSettings
from topology.device import Device, DeviceKind, cpu_devices
from topology.units import GIB, MIB


def test_it_is_as_configured_else_leaves_room_for_weights_on_cpu_devices() -> None:
    small = cpu_devices(count=8, memory_bytes=512 * MIB)
    assert served_kv_bytes(VllmSettings(kv_cache_bytes=3 * GIB), small) == 3 * GIB
    assert served_kv_bytes(SglangSettings(), small) == 256 * MIB
    assert served_kv_bytes(VllmSettings(), cpu_devices(count=1, memory_bytes=64 * GIB)) == GIB
    gpu = Device(id="GPU-1", kind=DeviceKind.CUDA, memory_total_bytes=80 * GIB, memory_reserved_bytes=79 * GIB)
    assert served_kv_bytes(SglangSettings(), [gpu]) == GIB
