"""Plans: which devices get the layers, beside the layout in force, other tenants and earlier changes."""

import itertools
import time
from collections.abc import Mapping
from dataclasses import replace

import pytest

from planner.errors import InvalidLayout
from planner.layout import Pipeline, Stage, pipeline_of
from planner.planning import plan, require_plan, stage_counts
from planner.problem import check_pipeline
from planner.question import EngineLimits, Fragmentation
from planner.replanner import PlanSession
from tests.support.costs import FlatCosts
from tests.support.graphs import graph_of
from tests.unit.planner.planning_questions import answer, chosen, host, question
from topology.cluster import ClusterTopology, merge
from topology.device import Device, DeviceKind, cpu_devices
from topology.link import Link, LinkKind
from topology.resource_graph import ResourceGraph
from topology.topology import HostTopology, pair_key
from topology.units import GIB, MIB


def test_slow_devices_get_fewer_layers() -> None:
    devices = [replace(device, name=name) for device, name in zip(host(2).devices, ("fast", "slow"), strict=True)]
    found = chosen(
        topology=HostTopology(host_id="h", devices=tuple(devices)),
        costs=FlatCosts(slowness={"slow": 3.0}),
        num_stages=2,
        engine=EngineLimits(max_stages=2, kv_tokens=4096),
    )
    counts = {stage.device_ids[0]: stage.num_decoders for stage in found.pipelines[0].stages}
    assert counts == {"cpu:0": 6, "cpu:1": 2}


@pytest.mark.parametrize("session", [None, PlanSession()])
def test_a_device_of_the_layout_in_force_that_is_gone_takes_only_its_own_layers_along(
    session: PlanSession | None,
) -> None:
    current = pipeline_of(device_ids=["cpu:0", "cpu:3"], cuts=[4], num_decoders=8)
    plan(question(num_stages=2), clock=time.monotonic, session=session)
    asked = question(num_stages=2, topology=host(3), current=current)
    found = require_plan(plan(asked, clock=time.monotonic, session=session))
    first, second = found.pipelines[0].stages
    assert first == current.stages[0]
    assert second.device_ids[0] in {"cpu:1", "cpu:2"}
    late = require_plan(plan(asked, clock=itertools.count(0.0, 100.0).__next__))
    assert late.pipelines[0].stages[0] == current.stages[0]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_resident_ranks_have_an_answer_though_no_time_is_left(stages: int) -> None:
    ranks = (("cpu:4",), ("cpu:1",), ("cpu:6",), ("cpu:0",))
    engine = EngineLimits(max_stages=4, kv_tokens=4096, resident=ranks)
    late = plan(question(engine=engine, num_stages=stages), clock=itertools.count(0.0, 100.0).__next__)
    assert require_plan(late).pipelines[0].granularity == stages


def test_the_layout_in_force_stays_where_nothing_is_better() -> None:
    now = pipeline_of(device_ids=["cpu:3", "cpu:5"], cuts=[4], num_decoders=8)
    found = answer(current=now)
    assert require_plan(found).pipelines == (now,)
    assert require_plan(found).costs.moved_bytes == 0


def test_of_equal_devices_the_first_are_taken_in_order() -> None:
    assert chosen(num_stages=4).pipelines[0].device_ids == ("cpu:0", "cpu:1", "cpu:2", "cpu:3")
    now = pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[4], num_decoders=8)
    four = chosen(current=now, num_stages=4).pipelines[0]
    assert set(four.device_ids) == {"cpu:0", "cpu:1", "cpu:2", "cpu:3"}


def test_a_change_moves_little() -> None:
    now = pipeline_of(device_ids=["cpu:3", "cpu:5"], cuts=[4], num_decoders=8)
    four = chosen(current=now, num_stages=4).pipelines[0]
    assert {"cpu:3", "cpu:5"} <= set(four.device_ids)
    one = chosen(current=now, num_stages=1).pipelines[0]
    assert set(one.device_ids) <= {"cpu:3", "cpu:5"}


def test_the_layout_in_force_must_be_one_of_the_model() -> None:
    with pytest.raises(InvalidLayout):
        answer(current=pipeline_of(device_ids=["cpu:0"], cuts=[], num_decoders=5))


def test_resident_ranks_keep_their_order_and_both_ends() -> None:
    ranks = (("cpu:4",), ("cpu:1",), ("cpu:6",), ("cpu:0",))
    engine = EngineLimits(max_stages=4, kv_tokens=4096, resident=ranks)
    assert stage_counts(question(engine=engine)) == (2, 3, 4)
    three = chosen(engine=engine, num_stages=3).pipelines[0]
    assert three.device_ids[0] == "cpu:4"
    assert three.device_ids[-1] == "cpu:0"


def gpus(count: int, *, islands: int, memory_bytes: int = 8 * GIB, others: tuple[int, ...] = ()) -> HostTopology:
    """Return GPUs of which ``count / islands`` each are joined by NVLink; those of ``others`` have other tenants."""
    devices = tuple(
        Device(
            id=f"GPU-{index}",
            kind=DeviceKind.CUDA,
            memory_total_bytes=memory_bytes,
            memory_reserved_bytes=GIB if index in others else 0,
            memory_others_bytes=GIB if index in others else 0,
            host_id="h",
        )
        for index in range(count)
    )
    size = count // islands
    links = {
        pair_key(a.id, b.id): Link(kind=LinkKind.NVSWITCH, bandwidth_bytes_per_s=3e11, latency_s=2e-6)
        for (i, a), (j, b) in itertools.combinations(enumerate(devices), 2)
        if i // size == j // size
    }
    return HostTopology(host_id="h", devices=devices, links=links)


def test_tensor_parallel_groups_stay_within_an_island() -> None:
    engine = EngineLimits(max_stages=8, degrees=(2, 4, 8), kv_tokens=4096)
    found = answer(topology=gpus(8, islands=2), engine=engine, graph=graph_of())
    assert {each.degree for each in found.candidates} == {2, 4}
    for each in found.candidates:
        for pipeline in each.found.pipelines if each.found else ():
            for stage in pipeline.stages:
                assert len({int(device.removeprefix("GPU-")) // 4 for device in stage.device_ids}) == 1


def test_leftovers_are_used_before_whole_gpus_but_not_in_bursts() -> None:
    small = EngineLimits(max_stages=1, kv_tokens=4096)
    machine = gpus(4, islands=1, others=(2,))
    calm = chosen(topology=machine, engine=small)
    assert calm.pipelines[0].device_ids == ("GPU-2",)
    bursty = chosen(topology=machine, engine=small, workload=replace(question().workload, cv=4.0))
    assert bursty.pipelines[0].device_ids != ("GPU-2",)
    careless = chosen(topology=machine, engine=small, fragmentation=Fragmentation(whole_device=0, whole_island=0))
    assert careless.pipelines[0].device_ids != ("GPU-2",)


def marked_cluster(*scaled: str) -> tuple[ClusterTopology, Mapping[str, float]]:
    hosts = [
        HostTopology(host_id=name, rack=rack, devices=cpu_devices(count=2, memory_bytes=64 * MIB))
        for name, rack in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    cluster = merge(hosts)
    return cluster, ResourceGraph(cluster=cluster).scaled(scaled, now_s=0.0).heats(now_s=10.0)


@pytest.mark.parametrize(
    ("scaled", "expected"), [((), "a"), (("a/cpu:0",), "c"), (("a/cpu:0", "c/cpu:0", "c/cpu:1"), "b")]
)
def test_new_instances_avoid_paths_with_marks_of_recent_scaling(scaled: tuple[str, ...], expected: str) -> None:
    cluster, marks = marked_cluster(*scaled)
    found = chosen(topology=cluster, scaling=marks, num_stages=2)
    assert {device.partition("/")[0] for device in found.pipelines[0].device_ids} == {expected}


def test_marks_do_not_drive_a_layout_away_from_where_it_is() -> None:
    cluster, marks = marked_cluster("a/cpu:0", "a/cpu:1")
    current = pipeline_of(device_ids=["a/cpu:0", "a/cpu:1"], cuts=[4], num_decoders=8)
    assert chosen(topology=cluster, scaling=marks, num_stages=2, current=current).pipelines == (current,)


def test_any_pipeline_can_be_held_against_the_rules() -> None:
    fine = pipeline_of(device_ids=["cpu:7", "cpu:2"], cuts=[3], num_decoders=8)
    assert check_pipeline(question(), fine) == ()
    [sentence] = check_pipeline(question(topology=host(memory_bytes=6 * MIB)), fine)
    assert sentence.startswith("stage 1 needs 6.")
    elsewhere = pipeline_of(device_ids=["cpu:99"], cuts=[], num_decoders=8)
    assert "cpu:99, which is no place" in check_pipeline(question(), elsewhere)[0]
    pairs = Stage(device_ids=("cpu:0", "cpu:1"), first_decoder=0, end_decoder=4)
    alone = Stage(device_ids=("cpu:2",), first_decoder=4, end_decoder=8)
    assert "1 and 2 devices" in check_pipeline(question(), Pipeline(stages=(pairs, alone)))[0]
    headless = Pipeline(
        stages=(replace(alone, first_decoder=0), replace(alone, device_ids=("cpu:0",), first_decoder=8))
    )
    assert check_pipeline(question(), headless) == ()
