"""What one model holds of devices is not free for another one."""

from flexpiped.device_sharing import devices_beside, held_by, together
from tests.support.graphs import graph_of
from tests.support.layouts import even_pipeline
from topology.device import cpu_devices
from topology.units import MIB


def test_weights_and_the_whole_kv_cache_are_held_where_the_stages_are() -> None:
    graph = graph_of()
    even = even_pipeline(2, num_decoders=graph.num_decoders)
    held = held_by([even], graph, kv_tokens=1000)

    assert set(held) == {"cpu:0", "cpu:1"}
    assert sum(held.values()) == sum(held_by([even], graph, kv_tokens=0).values()) + 1000 * graph.kv_bytes_per_token
    budgets = held_by([even], graph, kv_device_bytes=MIB)
    assert sum(budgets.values()) == sum(held_by([even], graph).values()) + 2 * MIB
    assert together([held, held])["cpu:0"] == 2 * held["cpu:0"]


def test_devices_are_shown_without_it_and_as_shared_and_never_below_nothing() -> None:
    devices = devices_beside(cpu_devices(count=3, memory_bytes=64 * MIB), {"cpu:0": 24 * MIB, "cpu:1": 99 * MIB})

    assert [each.memory_usable_bytes for each in devices] == [40 * MIB, 0, 64 * MIB]
    assert [each.is_shared for each in devices] == [True, True, False]
