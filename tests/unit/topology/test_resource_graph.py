"""The hierarchy of shared resources, and marks of recent scaling that fade."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.cluster import ClusterTopology, merge
from topology.device import cpu_devices
from topology.errors import UnknownDevice
from topology.resource_graph import Level, ResourceGraph
from topology.topology import HostTopology
from topology.units import GIB


def host(name: str, rack: str) -> HostTopology:
    return HostTopology(host_id=name, rack=rack, devices=cpu_devices(count=2, memory_bytes=GIB))


def cluster() -> ClusterTopology:
    return merge([host("a", "1"), host("b", "1"), host("c", "2")])


ALL = [device.id for device in cluster().devices]


def test_three_levels_with_what_they_offer() -> None:
    graph = ResourceGraph(cluster=cluster(), storage_bytes_per_s=7e9)

    server, rack, top = graph.path("b/cpu:1")

    assert [node.level for node in (server, rack, top)] == [Level.SERVER, Level.RACK, Level.CLUSTER]
    assert [len(node.device_ids) for node in (server, rack, top)] == [2, 4, 6]
    assert [node.memory_free_bytes // GIB for node in (server, rack, top)] == [2, 4, 6]
    assert (server.parent_id, rack.parent_id, top.parent_id) == (rack.id, top.id, "")
    assert rack.bandwidth_bytes_per_s == cluster().network.within_rack.bandwidth_bytes_per_s
    assert top.bandwidth_bytes_per_s == 7e9
    with pytest.raises(UnknownDevice):
        graph.path("d/cpu:0")


def test_new_instances_go_where_nothing_was_scaled_lately() -> None:
    graph = ResourceGraph(cluster=cluster()).scaled(["a/cpu:0"], now_s=100)

    heats = {device_id[0]: graph.heat(device_id, now_s=100) for device_id in ALL}

    assert heats["a"] > heats["b"] > heats["c"] > 0  # same server, same rack, same cluster
    assert graph.coolest(ALL, now_s=100)[:2] == ("c/cpu:0", "c/cpu:1")
    assert graph.coolest(ALL, now_s=100)[-2:] == ("a/cpu:0", "a/cpu:1")


def test_only_what_tells_paths_apart_counts() -> None:
    graph = ResourceGraph(cluster=cluster())
    assert graph.heats(now_s=0) == {}
    heats = graph.scaled(["a/cpu:0"], now_s=0).heats(now_s=0)
    assert heats == pytest.approx({"a/cpu:0": 1.25, "a/cpu:1": 1.25, "b/cpu:0": 0.25, "b/cpu:1": 0.25})
    assert graph.scaled(ALL[::2], now_s=0).heats(now_s=0).keys() == {"a/cpu:0", "a/cpu:1", "b/cpu:0", "b/cpu:1"}


def test_marks_fade_by_half_and_add_up() -> None:
    graph = ResourceGraph(cluster=cluster(), half_life_s=10).scaled(["a/cpu:0", "a/cpu:1"], now_s=0)

    assert graph.mark_of("server:a", now_s=0) == 2
    assert graph.mark_of("server:a", now_s=10) == 1
    assert graph.scaled(["a/cpu:0"], now_s=10).mark_of("server:a", now_s=20) == 1
    assert graph.mark_of("server:a", now_s=-5) == 2  # a clock that went back


def test_the_graph_before_is_left_as_it_was() -> None:
    before = ResourceGraph(cluster=cluster())
    before.scaled(ALL, now_s=0)

    assert {before.heat(device_id, now_s=0) for device_id in ALL} == {0.0}


def test_a_newer_view_keeps_what_has_not_faded() -> None:
    graph = ResourceGraph(cluster=cluster(), half_life_s=1).scaled(["a/cpu:0"], now_s=0).scaled(["c/cpu:0"], now_s=50)

    newer = graph.with_cluster(cluster().without_host("b"), now_s=50)
    gone = graph.with_cluster(cluster().without_host("c"), now_s=50)

    assert set(newer.marks) == {"server:c", "rack:2", "cluster"}
    assert set(gone.marks) == {"cluster"}


def test_a_half_life_is_positive() -> None:
    with pytest.raises(ValueError, match="half-life of 0"):
        ResourceGraph(cluster=cluster(), half_life_s=0)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.tuples(st.sampled_from(ALL), st.floats(0, 100)), max_size=12), st.floats(0, 500))
def test_heat_never_grows_by_waiting(actions: list[tuple[str, float]], wait_s: float) -> None:
    graph, now_s = ResourceGraph(cluster=cluster()), 0.0
    for device_id, pause_s in actions:
        now_s += pause_s
        graph = graph.scaled([device_id], now_s=now_s)

    for device_id in ALL:
        assert 0 <= graph.heat(device_id, now_s=now_s + wait_s) <= graph.heat(device_id, now_s=now_s)


def test_on_one_host_marks_tell_no_path_from_another() -> None:
    """So a daemon, which is one host, has nothing to tell its planner of recent scaling."""
    graph = ResourceGraph(cluster=merge([host("a", "1")])).scaled(["a/cpu:0"], now_s=0)
    assert graph.heat("a/cpu:0", now_s=0) == graph.heat("a/cpu:1", now_s=0) > 0
    assert graph.heats(now_s=0) == {}
