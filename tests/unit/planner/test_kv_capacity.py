"""How many KV blocks a layout has: of one size, or by a budget of each device."""

from hypothesis import given
from hypothesis import strategies as st

from planner.kv_capacity import KvInAll, KvPerDevice
from planner.layout import Pipeline, Stage, pipeline_of
from tests.support.graphs import weighted_graph
from topology.units import KIB

GRAPH = weighted_graph([KIB] * 8, embedding=KIB, head=KIB, kv_bytes_per_token=64)  # of each decoder
SIZE = KvPerDevice(device_bytes=8 * 64 * 16 * 10, block_tokens=16)  # 10 KV blocks of all decoders


def pipeline(*cuts: int, first_device: int = 0) -> Pipeline:
    devices = [f"cpu:{first_device + index}" for index in range(len(cuts) + 1)]
    return pipeline_of(device_ids=devices, cuts=list(cuts), num_decoders=8)


def test_a_kv_cache_of_one_size_is_that_whatever_the_layout() -> None:
    size = KvInAll(total_bytes=8 * 64 * 16 * 10 + 5, block_tokens=16)
    assert {size.blocks(GRAPH, pipeline()), size.blocks(GRAPH, pipeline(2, 4, 6)), size.least_blocks(GRAPH)} == {10}
    assert size.most_blocks(GRAPH, 8) == 10


def test_twice_the_stages_have_twice_the_kv_blocks() -> None:
    assert [SIZE.blocks(GRAPH, pipeline(*cuts)) for cuts in ((), (4,), (2, 4, 6))] == [10, 20, 40]
    assert SIZE.tokens(GRAPH, pipeline(4)) == 20 * 16


def test_the_device_with_the_most_layers_decides() -> None:
    assert SIZE.blocks(GRAPH, pipeline(2)) == 80 // 6
    assert SIZE.blocks(GRAPH, pipeline(7)) == 80 // 7


def test_while_two_layouts_exist_a_device_holds_the_layers_of_both() -> None:
    assert SIZE.blocks(GRAPH, pipeline(), pipeline(4)) == 10  # cpu:0 keeps all eight until the first one is freed
    assert SIZE.blocks(GRAPH, pipeline(4), pipeline(5)) == 80 // 5  # what it has in both counts once
    assert SIZE.blocks(GRAPH, pipeline(4), pipeline(4, first_device=2)) == 20
    swapped = pipeline_of(device_ids=["cpu:1", "cpu:0"], cuts=[4], num_decoders=8)
    assert SIZE.blocks(GRAPH, pipeline(4), swapped) == 10


def test_a_share_of_a_tensor_parallel_stage_is_a_share_of_its_kv_cache() -> None:
    group = Pipeline(stages=(Stage(device_ids=("gpu:0", "gpu:1"), first_decoder=0, end_decoder=8),))
    assert SIZE.blocks(GRAPH, group) == 20


@given(
    devices=st.integers(1, 10),
    cuts=st.sets(st.integers(1, 7)),
    other=st.sets(st.integers(1, 7)),
    block=st.integers(1, 9),
)
def test_no_layout_has_fewer_than_the_least_or_more_than_the_most(
    devices: int, cuts: set[int], other: set[int], block: int
) -> None:
    size = KvPerDevice(device_bytes=12_345, block_tokens=block)
    first, second = (pipeline(*sorted(each)[: devices - 1]) for each in (cuts, other))
    both = size.blocks(GRAPH, first, second)
    assert size.least_blocks(GRAPH) <= both <= min(size.blocks(GRAPH, first), size.blocks(GRAPH, second))
    assert size.blocks(GRAPH, first) <= size.most_blocks(GRAPH, devices)
