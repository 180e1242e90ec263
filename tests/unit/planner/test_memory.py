"""The memory check of a refactoring: both layouts at once, in numbers and in sentences."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.layout import Pipeline, pipeline_of
from planner.memory import KvBudget, check_memory
from tests.support.graphs import SMALL_GPT2, graph_of, weighted_graph
from topology.device import cpu_devices
from topology.units import KIB, MIB

GRAPH = weighted_graph([MIB] * 8, embedding=MIB // 2, head=MIB // 4, kv_bytes_per_token=KIB)
KV = KvBudget(block_tokens=16, capacity_blocks=64, live_blocks=20)  # 1 MiB a decoder, of which 320 KiB live
DEVICES = cpu_devices(count=8, memory_bytes=96 * MIB)


def pipeline(stages: int, *, first_device: int = 0) -> Pipeline:
    return pipeline_of(
        device_ids=[f"cpu:{first_device + index}" for index in range(stages)],
        cuts=[8 * stage // stages for stage in range(1, stages)],
        num_decoders=8,
    )


def test_a_split_that_fits_names_each_device_that_gains() -> None:
    check = check_memory(
        graph=GRAPH, current=pipeline(2), target=pipeline(4), devices=DEVICES, kv=KV, workspace_bytes=MIB
    )
    assert check.fits
    assert check.refusals == ()
    assert check.sentences == (
        "needs 4 of 87 MiB free on cpu:1: 2 MiB weights, 2 MiB KV (640 KiB live) for 2-3",
        "needs 5 of 96 MiB free on cpu:2: 2 MiB weights, 2 MiB KV (640 KiB live), 1 MiB workspace for 4-5",
        "needs 5.2 of 96 MiB free on cpu:3: 2.2 MiB weights, 2 MiB KV (640 KiB live), 1 MiB workspace for 6-7 and head",
    )
    assert [device.device_id for device in check.devices] == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]
    first = check.devices[0]
    assert (first.held_bytes, first.needed_bytes, first.gained) == (9 * MIB + MIB // 2, 0, "")


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    small = tuple(replace(device, memory_total_bytes=12 * MIB) for device in DEVICES)
    check = check_memory(graph=GRAPH, current=pipeline(2), target=pipeline(1), devices=small, kv=KV)
    assert not check.fits
    assert check.sentences == (
        "needs 8.2 of 3.5 MiB free on cpu:0, 4.8 MiB too few: "
        "4.2 MiB weights, 4 MiB KV (1.2 MiB live) for 4-7 and head",
    )


def test_the_last_byte_decides() -> None:
    def check(total: int) -> bool:
        devices = (replace(DEVICES[0], memory_total_bytes=total),)
        return check_memory(graph=GRAPH, current=None, target=pipeline(1), devices=devices, kv=KV).fits

    needed = 8 * MIB + MIB // 2 + MIB // 4 + 8 * MIB
    assert check(needed)
    assert not check(needed - 1)


def test_live_kv_blocks_must_have_room() -> None:
    kv = KvBudget(block_tokens=16, capacity_blocks=10, live_blocks=20)
    check = check_memory(graph=GRAPH, current=pipeline(1), target=pipeline(2), devices=DEVICES, kv=kv)
    assert check.sentences == ("20 KV blocks are live, but the target has room for 10",)


def test_a_device_that_is_not_here_is_named() -> None:
    check = check_memory(
        graph=GRAPH, current=pipeline(1), target=pipeline(2, first_device=7), devices=DEVICES[:2], kv=KV
    )
    assert check.sentences[0] == "no device cpu:7 is here; the devices are cpu:0, cpu:1"


def test_a_tied_table_is_counted_once_per_device() -> None:
    graph = graph_of(SMALL_GPT2)
    one, two = (
        pipeline_of(device_ids=names, cuts=cuts, num_decoders=4)
        for names, cuts in ((["cpu:0"], []), (["cpu:0", "cpu:1"], [2]))
    )
    kv = KvBudget(block_tokens=16, capacity_blocks=0)
    start = check_memory(graph=graph, current=None, target=one, devices=DEVICES, kv=kv)
    assert start.devices[0].needed_bytes == graph.total_weight_bytes
    merge = check_memory(graph=graph, current=two, target=one, devices=DEVICES, kv=kv)
    both = sum(layer.weight_bytes for layer in graph.decoders[2:]) + graph.head.weight_bytes - graph.shared_bytes
    assert merge.devices[0].needed_bytes == both


def test_a_second_instance_shares_nothing_with_the_first() -> None:
    check = check_memory(
        graph=GRAPH,
        current=pipeline(2),
        target=pipeline(4),
        devices=DEVICES,
        kv=KV,
        workspace_bytes=MIB,
        second_instance=True,
    )
    assert check.sentences == (
        "needs 5.5 of 86 MiB free on cpu:0: 2.5 MiB weights, 2 MiB KV (640 KiB live), 1 MiB workspace "
        "for embedding and 0-1",
        "needs 5 of 87 MiB free on cpu:1: 2 MiB weights, 2 MiB KV (640 KiB live), 1 MiB workspace for 2-3",
        "needs 5 of 96 MiB free on cpu:2: 2 MiB weights, 2 MiB KV (640 KiB live), 1 MiB workspace for 4-5",
        "needs 5.2 of 96 MiB free on cpu:3: 2.2 MiB weights, 2 MiB KV (640 KiB live), 1 MiB workspace for 6-7 and head",
    )
    small = tuple(replace(device, memory_total_bytes=14 * MIB) for device in DEVICES)
    both = check_memory(
        graph=GRAPH, current=pipeline(2), target=pipeline(2), devices=small, kv=KV, second_instance=True
    )
    assert not both.fits
    assert both.sentences[0].startswith("needs 8.5 of 5.5 MiB free on cpu:0, 3 MiB too few")


@pytest.mark.parametrize("bad", [{"block_tokens": 0}, {"capacity_blocks": -1}, {"live_blocks": -1}])
def test_impossible_kv_budgets_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="impossible KV budget"):
        KvBudget(**{"block_tokens": 16, "capacity_blocks": 4, **bad})


@given(stages=st.tuples(st.integers(1, 8), st.integers(1, 8)), room=st.integers(0, 40))
def test_what_fits_together_fits_alone(stages: tuple[int, int], room: int) -> None:
    """A refactoring is never easier than starting in its target, and every held byte is in one of both layouts."""
    devices = cpu_devices(count=8, memory_bytes=room * MIB)
    current, target = pipeline(stages[0]), pipeline(stages[1])
    both = check_memory(graph=GRAPH, current=current, target=target, devices=devices, kv=KV)
    alone = check_memory(graph=GRAPH, current=None, target=target, devices=devices, kv=KV)
    started = check_memory(graph=GRAPH, current=None, target=current, devices=devices, kv=KV)
    if started.fits and both.fits:
        assert alone.fits
    for device in both.devices:
        peak = device.held_bytes + device.needed_bytes
        mine = [other for other in alone.devices if other.device_id == device.device_id]
        assert peak >= sum(other.needed_bytes for other in mine)
