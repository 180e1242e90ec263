"""What an engine has on every stage: counted on each device, placed nowhere, and never moved."""

from dataclasses import replace

import pytest

from planner.errors import NoFeasiblePlan
from planner.holdings import holdings, weight_bytes
from planner.layout import Pipeline, pipeline_of
from planner.memory import KvBudget, check_memory
from planner.model_graph import LayerKind, ModelGraph
from planner.moves import moves
from planner.question import EngineLimits
from tests.support.graphs import weighted_graph
from tests.unit.planner.planning_questions import answer, by_stages, chosen, host
from topology.device import cpu_devices
from topology.units import MIB

HEAD, BOTH = frozenset({LayerKind.HEAD}), frozenset({LayerKind.HEAD, LayerKind.EMBEDDING})
UNTIED = weighted_graph([MIB] * 8, embedding=2 * MIB, head=2 * MIB)
TIED = weighted_graph([MIB] * 8, embedding=2 * MIB, head=2 * MIB, shared=2 * MIB)
KV = KvBudget(block_tokens=16, capacity_blocks=0)


def on_stages(graph: ModelGraph, kinds: frozenset[LayerKind]) -> ModelGraph:
    return replace(graph, on_every_stage=kinds)


def halves(*devices: str) -> Pipeline:
    return pipeline_of(device_ids=devices, cuts=[4], num_decoders=8)


@pytest.mark.parametrize(
    ("graph", "kinds", "held_mib"),
    [
        (UNTIED, frozenset(), [6, 6]),
        (UNTIED, HEAD, [8, 6]),
        (UNTIED, BOTH, [8, 8]),
        (TIED, frozenset(), [6, 6]),
        (TIED, BOTH, [6, 6]),
    ],
)
def test_each_device_holds_it_and_a_tied_table_once(
    graph: ModelGraph, kinds: frozenset[LayerKind], held_mib: list[int]
) -> None:
    graph = on_stages(graph, kinds)
    held = holdings(halves("cpu:0", "cpu:1"), graph)
    assert [weight_bytes(each, graph) // MIB for each in held.values()] == held_mib


def test_a_device_that_gets_a_stage_needs_room_for_it_and_another_layout_of_the_same_devices_does_not() -> None:
    graph, current = on_stages(UNTIED, HEAD), halves("cpu:0", "cpu:1")
    devices = cpu_devices(count=4, memory_bytes=9 * MIB)
    check = check_memory(
        graph=graph, current=current, target=halves("cpu:2", "cpu:3"), devices=devices, kv=KV, second_instance=True
    )
    assert check.sentences[0] == "needs 8 of 9 MiB free on cpu:2: 8 MiB weights for embedding and 0-3 and head"
    further = pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[5], num_decoders=8)
    check = check_memory(graph=graph, current=current, target=further, devices=devices, kv=KV)
    assert check.sentences == ("needs 1 of 1 MiB free on cpu:0: 1 MiB weights for 4",)


def test_it_is_no_move() -> None:
    apart = pipeline_of(device_ids=["cpu:0", "cpu:2", "cpu:1"], cuts=[2, 4], num_decoders=8)
    found = moves(halves("cpu:0", "cpu:1"), apart, on_stages(UNTIED, BOTH))
    assert [move.layer for move in found] == ["decoder 2", "decoder 3"]


@pytest.mark.parametrize(
    ("graph", "kinds"),
    # of the first stage with a tied head beside it, the plan counts the table twice: on the safe side
    [(UNTIED, frozenset()), (UNTIED, HEAD), (UNTIED, BOTH), (TIED, frozenset()), (TIED, BOTH)],
)
@pytest.mark.parametrize("degree", [1, 2])
def test_a_plan_counts_what_the_check_counts(graph: ModelGraph, kinds: frozenset[LayerKind], degree: int) -> None:
    graph = on_stages(graph, kinds)
    engine = EngineLimits(max_stages=4, degrees=(degree,), max_sequences=16, max_step_tokens=256, kv_tokens=4096)
    for candidate in by_stages(answer(graph=graph, engine=engine)).values():
        assert candidate.found is not None
        held = holdings(candidate.found.pipelines[0], graph)
        for stage in candidate.found.memory:
            assert {weight_bytes(held[device], graph) for device in stage.device_ids} == {stage.weight_bytes}


def test_a_plan_counts_it_once_for_a_stage_that_stays() -> None:
    graph, half = on_stages(UNTIED, HEAD), halves("cpu:0", "cpu:1")
    tight = host(2, memory_bytes=9 * MIB)  # 8 MiB of weights on the first
    assert chosen(graph=graph, topology=tight, num_stages=2, current=half).pipelines == (half,)
    with pytest.raises(NoFeasiblePlan):
        chosen(graph=graph, topology=tight, num_stages=2, current=half, shares_current=False)


def test_what_does_not_fit_beside_it_is_no_plan() -> None:
    room = host(2, memory_bytes=7 * MIB)  # 6 MiB of layers on each of two
    assert chosen(graph=UNTIED, topology=room, num_stages=2).pipelines[0].granularity == 2
    with pytest.raises(NoFeasiblePlan):
        chosen(graph=on_stages(UNTIED, BOTH), topology=room, num_stages=2)
