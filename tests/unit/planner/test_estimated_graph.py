"""Models whose family is not known here."""

from dataclasses import dataclass

import pytest

from planner.errors import UnsupportedModel
from planner.estimated_graph import estimate_model_graph
from planner.model_graph import LayerKind

SIZES = {
    "model_type": "novel",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 99,
}


@dataclass(frozen=True)
class Header:
    dtype: str
    shape: tuple[int, ...]


TENSORS = {
    "model.embed_tokens.weight": Header("BF16", (10, 8)),
    "model.layers.0.mlp.weight": Header("BF16", (8, 8)),
    "model.layers.1.mlp.weight": Header("BF16", (8, 8)),
    "model.layers.1.mlp.scales": Header("F32", (8,)),
    "model.norm.weight": Header("BF16", (8,)),
    "lm_head.weight": Header("BF16", (10, 8)),
    "vision_tower.layers.0.weight": Header("BF16", (3, 3)),
}


def test_tensors_lie_with_the_layer_that_their_names_say() -> None:
    graph = estimate_model_graph(SIZES, TENSORS)
    assert [layer.kind for layer in graph.layers] == [
        LayerKind.EMBEDDING,
        LayerKind.DECODER,
        LayerKind.DECODER,
        LayerKind.HEAD,
    ]
    assert [layer.weight_bytes for layer in graph.layers] == [2 * (80 + 9), 128, 128 + 16, 2 * (8 + 80)]
    assert graph.decoders[0].kv_bytes_per_token == 2 * 2 * 2 * 2
    assert (graph.max_context_tokens, graph.vocab_size, graph.legal_cuts, graph.dtype) == (99, 10, (1,), "bfloat16")
    assert not graph.tied


def test_a_tied_table_counts_with_both() -> None:
    tensors = {name: header for name, header in TENSORS.items() if name != "lm_head.weight"}
    graph = estimate_model_graph(SIZES, tensors, dtype="float32")
    assert graph.tied
    assert graph.head.weight_bytes == 4 * (8 + 80)
    assert graph.shared_bytes == 4 * 80


def test_quantised_tensors_take_what_is_stored() -> None:
    tensors = TENSORS | {
        "model.layers.0.mlp.weight": Header("I32", (8, 1)),
        "model.layers.0.x": Header("F8_E4M3", (4,)),
    }
    assert estimate_model_graph(SIZES, tensors).decoders[0].weight_bytes == 32 + 4


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "w_bit": 4},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
    ],
)
def test_packed_weights_are_computed_with_one_by_one(quantisation: dict[str, object]) -> None:
    packed = TENSORS | {"model.layers.0.mlp.weight": Header("I32", (1, 8)), "model.layers.0.g_idx": Header("I32", (8,))}
    plain, quantised = (
        estimate_model_graph(config, tensors)
        for config, tensors in ((SIZES, TENSORS), (SIZES | {"quantization_config": quantisation}, packed))
    )
    assert quantised.decoders[0].flops_per_token == plain.decoders[0].flops_per_token == 2 * 64
    assert quantised.decoders[0].weight_bytes == 4 * 8 + 4 * 8


def test_the_text_part_of_a_multimodal_config_counts() -> None:
    config = {"model_type": "seeing", "hidden_size": 1000, "text_config": SIZES | {"model_type": "inner"}}
    graph = estimate_model_graph(config, TENSORS)
    assert (graph.model_type, graph.hidden_size) == ("seeing", 8)


def test_other_names_of_the_same_things() -> None:
    config = {"n_layer": 2, "n_embd": 8, "n_head": 4, "vocab_size": 10, "torch_dtype": "float16"}
    graph = estimate_model_graph(config, {"h.0.w": Header("F16", (2, 2)), "h.1.w": Header("F16", (2, 2))})
    assert (graph.num_decoders, graph.dtype, graph.decoders[1].weight_bytes) == (2, "float16", 8)


def test_what_config_does_not_say_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="does not say num_hidden_layers"):
        estimate_model_graph({"model_type": "x"}, {})
