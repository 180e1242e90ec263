"""Moves between two layouts, and how they are told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import InvalidLayout
from planner.layout import Pipeline, Stage, pipeline_of
from planner.moves import Move, describe_moves, join_layer_names, moves
from tests.support.graphs import SMALL_GPT2, graph_of, weighted_graph
from topology.units import KIB, MIB

GRAPH = weighted_graph([100] * 8, embedding=7, head=9, kv_bytes_per_token=2)


def cut(*cuts: int, devices: str) -> Pipeline:
    return pipeline_of(device_ids=[f"cpu:{name}" for name in devices], cuts=cuts, num_decoders=8)


def test_the_same_layout_needs_no_move() -> None:
    assert moves(cut(4, devices="01"), cut(4, devices="01"), GRAPH) == ()
    assert describe_moves(()) == "nothing moves"


def test_a_split_moves_the_second_halves() -> None:
    found = moves(cut(4, devices="01"), cut(2, 4, 6, devices="0213"), GRAPH, live_kv_slots=50)
    assert found == (
        Move(layer="decoder 2", from_device="cpu:0", to_device="cpu:2", weight_bytes=100, kv_bytes=100),
        Move(layer="decoder 3", from_device="cpu:0", to_device="cpu:2", weight_bytes=100, kv_bytes=100),
        Move(layer="decoder 6", from_device="cpu:1", to_device="cpu:3", weight_bytes=100, kv_bytes=100),
        Move(layer="decoder 7", from_device="cpu:1", to_device="cpu:3", weight_bytes=100, kv_bytes=100),
        Move(layer="head", from_device="cpu:1", to_device="cpu:3", weight_bytes=9, kv_bytes=0),
    )
    assert describe_moves(found) == "layers 2-3 cpu:0 -> cpu:2, 6-7 and head cpu:1 -> cpu:3; 409 B weights, 400 B KV"


def test_elsewhere_moves_everything() -> None:
    found = moves(cut(devices="0"), cut(devices="5"), GRAPH)
    assert describe_moves(found) == "layers embedding and 0-7 and head cpu:0 -> cpu:5; 816 B weights, 0 B KV"


def test_a_tied_table_moves_only_where_it_is_not_yet() -> None:
    graph = graph_of(SMALL_GPT2)
    two = pipeline_of(device_ids=["a", "b"], cuts=[2], num_decoders=4)
    one_a = pipeline_of(device_ids=["a"], cuts=[], num_decoders=4)
    one_b = pipeline_of(device_ids=["b"], cuts=[], num_decoders=4)
    one_c = pipeline_of(device_ids=["c"], cuts=[], num_decoders=4)

    def weights(current: Pipeline, target: Pipeline) -> dict[str, int]:
        return {move.layer: move.weight_bytes for move in moves(current, target, graph)}

    assert weights(one_a, two)["head"] == graph.head.weight_bytes
    assert weights(two, one_a)["head"] == graph.head.weight_bytes - graph.shared_bytes
    assert weights(two, one_b)["embedding"] == graph.embedding.weight_bytes - graph.shared_bytes
    assert sum(weights(two, one_c).values()) == graph.total_weight_bytes


def test_shares_of_a_tensor_parallel_stage() -> None:
    one = cut(devices="0")
    pair = Pipeline(stages=(Stage(device_ids=("cpu:0", "cpu:1"), first_decoder=0, end_decoder=8),))
    found = moves(one, pair, GRAPH)
    assert {(move.from_device, move.to_device) for move in found} == {("cpu:0", "cpu:0"), ("cpu:0", "cpu:1")}
    assert sum(move.weight_bytes for move in found if move.to_device == "cpu:1" and "decoder" in move.layer) == 400
    back = moves(pair, cut(devices="5"), GRAPH)
    assert {move.from_device for move in back} == {"cpu:0"}
    assert moves(pair, pair, GRAPH) == ()


def test_a_layout_of_another_model_is_refused() -> None:
    other = pipeline_of(device_ids=["cpu:0"], cuts=[], num_decoders=6)
    with pytest.raises(InvalidLayout, match="the model has 8 decoder layers, but the layout places 6"):
        moves(cut(devices="0"), other, GRAPH)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["decoder 3"], "3"),
        (["embedding", "decoder 0", "decoder 1"], "embedding and 0-1"),
        (["decoder 2", "decoder 3", "decoder 6", "head"], "2-3 and 6 and head"),
    ],
)
def test_join_layer_names(names: list[str], text: str) -> None:
    assert join_layer_names(names) == text


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    stages = draw(st.integers(1, 8))
    cuts = sorted(draw(st.lists(st.integers(1, 7), min_size=stages - 1, max_size=stages - 1, unique=True)))
    devices = draw(st.permutations(range(8)))[:stages]
    return pipeline_of(device_ids=[f"cpu:{index}" for index in devices], cuts=cuts, num_decoders=8)


@given(current=pipelines(), target=pipelines())
def test_moves_lead_from_one_layout_to_the_other(current: Pipeline, target: Pipeline) -> None:
    graph = weighted_graph([1 << index for index in range(8)], embedding=1 << 10, head=1 << 11)
    found = {move.layer: move for move in moves(current, target, graph)}
    for index in range(8):
        source, destination = (pipeline.stage_of(index).device_ids[0] for pipeline in (current, target))
        move = found.get(f"decoder {index}")
        assert (move is None) == (source == destination)
        assert move is None or (move.from_device, move.to_device, move.weight_bytes) == (
            source,
            destination,
            1 << index,
        )
    assert ("embedding" in found) == (current.device_ids[0] != target.device_ids[0])
    assert ("head" in found) == (current.device_ids[-1] != target.device_ids[-1])


def test_bytes_are_told_with_units() -> None:
    move = Move(layer="decoder 0", from_device="a", to_device="b", weight_bytes=int(4.3 * MIB), kv_bytes=812 * KIB)
    assert describe_moves([move]) == "layers 0 a -> b; 4.3 MiB weights, 812 KiB KV"
