"""How large a KV cache is by the configuration, and where that does not say."""

from flexpiped.config_file import parse_config
from flexpiped.kv_capacity import native_kv_size, served_kv_bytes
from flexpiped.planner_question import engine_limits
from flexpiped.settings import SglangSettings, VllmSettings
from planner.kv_capacity import KvInAll, KvPerDevice
from tests.support.graphs import graph_of
from tests.support.layouts import even_pipeline
from topology.device import Device, DeviceKind, cpu_devices
from topology.units import GIB, MIB


def test_it_is_as_configured_else_leaves_room_for_weights_on_cpu_devices() -> None:
    small = cpu_devices(count=8, memory_bytes=512 * MIB)
    assert served_kv_bytes(VllmSettings(kv_cache_bytes=3 * GIB), small) == 3 * GIB
    assert served_kv_bytes(SglangSettings(), small) == 256 * MIB
    assert served_kv_bytes(VllmSettings(), cpu_devices(count=1, memory_bytes=64 * GIB)) == GIB
    gpu = Device(id="GPU-1", kind=DeviceKind.CUDA, memory_total_bytes=80 * GIB, memory_reserved_bytes=79 * GIB)
    assert served_kv_bytes(SglangSettings(), [gpu]) == GIB


def test_the_native_engine_has_one_of_one_size_or_a_budget_of_each_device() -> None:
    in_all = parse_config('[engines.native]\nkv_cache = "8 MiB"', file="my.toml")
    assert native_kv_size(in_all.engines.native) == KvInAll(total_bytes=8 * MIB, block_tokens=16)
    each = parse_config('[engines.native]\nkv_cache_per_device = "4 MiB"', file="my.toml")
    assert native_kv_size(each.engines.native) == KvPerDevice(device_bytes=4 * MIB, block_tokens=16)


def test_the_planner_is_told_which_it_is() -> None:
    graph, devices = graph_of(), cpu_devices(count=4, memory_bytes=GIB)
    layouts = [even_pipeline(stages, num_decoders=graph.num_decoders) for stages in (1, 2)]

    def tokens(line: str) -> list[int | None]:
        limits = engine_limits(parse_config(f"[engines.native]\n{line}", file=""), graph=graph, devices=devices)
        return [limits.kv_tokens_of(graph, each) for each in layouts]

    in_all = tokens('kv_cache = "4 MiB"')
    one, two = tokens('kv_cache_per_device = "4 MiB"')
    assert in_all == [one, one]
    assert one is not None
    assert two == 2 * one
