"""Batches, shares of layers, and the roofline that stands in for a profile."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import InvalidProfile
from planner.layer_costs import Batch, all_reduce_s, decode_batch, layer_classes, prefill_batch, shard, stage_s
from planner.model_graph import Experts
from planner.roofline import BANDWIDTH_REACHED, FLOPS_REACHED, LAUNCH_S, LAUNCHES, Roofline, roofline_for
from tests.support.graphs import graph_of
from topology.device import Device, DeviceKind

GPU = Device(id="GPU-1", kind=DeviceKind.CUDA, memory_total_bytes=80 << 30)
LLAMA_2_7B = {"model_type": "llama", "dtype": "float16", "hidden_size": 4096, "intermediate_size": 11008}


@dataclass(frozen=True)
class Figures:
    memory_bandwidth_bytes_per_s: float = 2e12
    flops_per_s: dict[str, float] = field(default_factory=lambda: {"float16": 300e12})
    is_estimate: bool = False


ROOFLINE = Roofline(dtype="float16", figures_of=lambda _device: Figures())


def test_pairs_of_a_prompt_and_of_decoding() -> None:
    assert prefill_batch(tokens=100).attended() == 100 * 101 / 2
    assert prefill_batch(tokens=10, context_tokens=100).attended() == sum(range(91, 101))
    assert decode_batch(sequences=4, context_tokens=50).attended() == 200
    assert decode_batch(sequences=4, context_tokens=50).attended(20) == 80
    assert decode_batch(sequences=4, context_tokens=50).cached(20) == 80


@given(sequences=st.integers(1, 8), own=st.integers(1, 60), before=st.integers(0, 100), window=st.integers(1, 200))
def test_pairs_under_a_window_are_counted_token_by_token(sequences: int, own: int, before: int, window: int) -> None:
    batch = Batch(tokens=sequences * own, sequences=sequences, context_tokens=sequences * (before + own))
    counted = sum(min(position + 1, window) for position in range(before, before + own))
    assert batch.attended(window) == pytest.approx(sequences * counted)
    assert batch.attended() == pytest.approx(sequences * sum(range(before + 1, before + own + 1)))


@pytest.mark.parametrize(("tokens", "sequences", "context"), [(0, 0, 0), (1, 2, 5), (5, 1, 4)])
def test_impossible_batches_are_refused(tokens: int, sequences: int, context: int) -> None:
    with pytest.raises(ValueError, match="impossible batch"):
        Batch(tokens=tokens, sequences=sequences, context_tokens=context)


def test_decoding_is_bound_by_bandwidth_and_a_prompt_by_arithmetic() -> None:
    decoder = graph_of(LLAMA_2_7B, dtype="F16").decoders[0]
    launches = LAUNCHES[decoder.kind] * LAUNCH_S[GPU.kind]
    one = ROOFLINE.layer_s(decoder, GPU, decode_batch(sequences=1, context_tokens=1))
    assert one - launches == pytest.approx(decoder.weight_bytes / (BANDWIDTH_REACHED * 2e12), rel=0.01)
    prompt = ROOFLINE.layer_s(decoder, GPU, prefill_batch(tokens=2048))
    flops = 2048 * decoder.flops_per_token + 2048 * 2049 / 2 * decoder.attention_flops_per_context_token
    assert prompt - launches == pytest.approx(flops / (FLOPS_REACHED * 300e12))
    longer = ROOFLINE.layer_s(decoder, GPU, decode_batch(sequences=64, context_tokens=4096))
    assert longer > 2 * ROOFLINE.layer_s(decoder, GPU, decode_batch(sequences=64, context_tokens=256))


def test_the_head_computes_one_position_a_sequence_and_the_embedding_reads_rows() -> None:
    graph = graph_of(LLAMA_2_7B, dtype="F16")
    few = ROOFLINE.layer_s(graph.head, GPU, prefill_batch(tokens=2048))
    assert few == pytest.approx(ROOFLINE.layer_s(graph.head, GPU, prefill_batch(tokens=1)))
    assert graph.embedding.weight_bytes_read(2) == 2 * 4096 * 2


def test_the_source_says_that_nothing_was_measured() -> None:
    assert ROOFLINE.source.startswith("not measured: roofline estimate for float16 from the devices' published")


def test_a_roofline_rests_on_what_is_known_of_the_devices() -> None:
    h100 = replace(GPU, name="NVIDIA H100 80GB HBM3")
    cpu = Device(id="cpu:0", kind=DeviceKind.CPU, memory_total_bytes=1 << 30, threads=2)
    mixed = roofline_for([h100, h100, cpu], dtype="bfloat16")
    assert "published bandwidth and FLOPs of H100 80GB HBM3 and guessed bandwidth and FLOPs of " in mixed.source
    decoder, batch = graph_of(LLAMA_2_7B, dtype="F16").decoders[0], decode_batch(sequences=1, context_tokens=1)
    assert mixed.layer_s(decoder, cpu, batch) > 20 * mixed.layer_s(decoder, h100, batch)
    with pytest.raises(InvalidProfile, match="no bandwidth and FLOPs are known of Some GPU: measure"):
        roofline_for([replace(GPU, name="Some GPU")], dtype="bfloat16")
    with pytest.raises(InvalidProfile, match="known of GPU-1"):
        mixed.layer_s(decoder, GPU, batch)


def test_a_stage_is_its_layers_and_what_it_takes_besides() -> None:
    graph = graph_of(LLAMA_2_7B, dtype="F16")
    classes = layer_classes(graph.layers)
    assert [count for _, count in classes] == [1, 32, 1]
    batch = decode_batch(sequences=8, context_tokens=100)
    parts = sum(ROOFLINE.layer_s(layer, GPU, batch) for layer in graph.layers)
    assert stage_s(ROOFLINE, classes, GPU, batch) == pytest.approx(parts + ROOFLINE.stage_overhead_s(GPU, batch))


def test_experts_are_read_as_they_are_chosen() -> None:
    experts = Experts(count=8, active=2, bytes_each=100)
    assert experts.expected_bytes_read(1) == pytest.approx(200)
    assert 799 < experts.expected_bytes_read(64) <= 800
    layer = replace(graph_of().decoders[0], weight_bytes=1000, experts=experts)
    assert layer.weight_bytes_read(1) == pytest.approx(400)


def test_a_share_of_a_layer_costs_its_part_and_one_exchange() -> None:
    decoder = graph_of(LLAMA_2_7B, dtype="F16").decoders[0]
    half = shard(decoder, 2)
    assert (half.weight_bytes, half.flops_per_token) == (decoder.weight_bytes // 2, decoder.flops_per_token // 2)
    assert shard(decoder, 1) is decoder
    once = all_reduce_s(decoder, degree=4, tokens=10, bandwidth_bytes_per_s=100e9, latency_s=1e-6)
    assert once == pytest.approx(2 * 6 * (10 * 8192 / 4 / 100e9 + 1e-6))
    assert all_reduce_s(decoder, degree=1, tokens=10, bandwidth_bytes_per_s=1, latency_s=1) == 0
    with pytest.raises(ValueError, match="at least 1, not 0"):
        shard(decoder, 0)
