"""The model graph: published parameter counts, costs worked out by hand, and what is refused by name."""

from collections.abc import Mapping

import pytest

from planner.errors import UnsupportedModel
from planner.layout import pipeline_of
from planner.model_graph import LayerKind, build_model_graph, kv_cache_bytes_per_token
from tests.support.graphs import SMALL_GPT2, SMALL_LLAMA, Header, graph_of, headers

LLAMA_2_7B = {"model_type": "llama", "dtype": "float16", "hidden_size": 4096, "intermediate_size": 11008}
LLAMA_3_8B = {
    **LLAMA_2_7B, "dtype": "bfloat16", "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
TINY_LLAMA = {
    "model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip
LLAMA_32_1B = {
    "model_type": "llama", "dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "dtype": "float32"}
GPT2_XL = {"model_type": "gpt2", "dtype": "float32", "n_embd": 1600, "n_layer": 48, "n_head": 25}


@pytest.mark.parametrize(
    ("config", "parameters", "dtype_bytes"),
    [
        (LLAMA_2_7B, 6_738_415_616, 2),
        (LLAMA_3_8B, 8_030_261_248, 2),
        (TINY_LLAMA, 1_100_048_384, 2),
        (LLAMA_32_1B, 1_235_814_400, 2),
        (GPT2, 124_439_808, 4),
        (GPT2_XL, 1_557_611_200, 4),
    ],
    ids=["Llama-2-7B", "Llama-3-8B", "TinyLlama", "Llama-3.2-1B", "GPT-2", "GPT-2 XL"],
)
def test_parameters_agree_with_the_published_count(
    config: Mapping[str, object], parameters: int, dtype_bytes: int
) -> None:
    assert graph_of(config).total_weight_bytes == parameters * dtype_bytes


def test_layers_stand_in_order_and_cuts_lie_between_decoders() -> None:
    graph = graph_of()
    assert [layer.name for layer in graph.layers] == ["embedding", *(f"decoder {i}" for i in range(8)), "head"]
    assert {layer.kind for layer in graph.decoders} == {LayerKind.DECODER}
    assert graph.num_decoders == 8
    assert graph.legal_cuts == (1, 2, 3, 4, 5, 6, 7)
    assert not graph.tied


def test_costs_of_a_small_llama_by_hand() -> None:
    graph = graph_of()
    decoder = graph.decoders[3]
    matrices = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 176  # q, k and v, o, and the MLP
    assert decoder.weight_bytes == 4 * (matrices + 2 * 64)
    assert decoder.flops_per_token == 2 * matrices
    assert decoder.kv_bytes_per_token == 2 * 2 * 16 * 4  # key and value, 2 heads of 16, float32
    assert decoder.activation_bytes_per_token == 64 * 4
    assert decoder.attention_flops_per_context_token == 4 * 64
    assert decoder.workspace_bytes_per_token == (2 * 64 + 3 * 176) * 4
    assert graph.embedding.weight_bytes == 512 * 64 * 4
    assert graph.head.weight_bytes == (512 * 64 + 64) * 4
    assert graph.head.activation_bytes_per_token == 512 * 4
    assert graph.kv_bytes_per_token == 8 * decoder.kv_bytes_per_token
    assert graph.embedding.kv_bytes_per_token == graph.head.kv_bytes_per_token == 0
    assert "model.layers.3.mlp.up_proj.weight" in decoder.tensor_names
    assert graph.head.tensor_names == ("model.norm.weight", "lm_head.weight")


def test_a_tied_table_counts_for_both_ends_but_once_on_one_device() -> None:
    graph = graph_of(SMALL_GPT2)
    table = 300 * 32 * 4
    assert graph.shared_bytes == table
    assert graph.embedding.weight_bytes == table + 128 * 32 * 4
    assert graph.head.weight_bytes == table + 2 * 32 * 4
    assert graph.head.tensor_names[-1] == graph.embedding.tensor_names[0] == "transformer.wte.weight"
    together = graph.weight_bytes((graph.embedding, graph.head))
    assert together == graph.embedding.weight_bytes + graph.head.weight_bytes - table
    one = pipeline_of(device_ids=["a"], cuts=[], num_decoders=4)
    two = pipeline_of(device_ids=["a", "b"], cuts=[1], num_decoders=4)
    assert graph.weight_bytes(graph.stage_layers(one, 0)) == graph.total_weight_bytes
    apart = sum(graph.weight_bytes(graph.stage_layers(two, index)) for index in range(2))
    assert apart == graph.total_weight_bytes + table
    assert [layer.name for layer in graph.stage_layers(two, 0)] == ["embedding", "decoder 0"]


def test_two_tables_in_the_checkpoint_are_kept_apart_even_if_the_config_ties_them() -> None:
    config = {**SMALL_LLAMA, "tie_word_embeddings": True}
    tensors = headers(config)
    assert build_model_graph(config, tensors).tied
    assert not build_model_graph(config, {**tensors, "lm_head.weight": Header((512, 64))}).tied
    only_head = {name: header for name, header in tensors.items() if "embed_tokens" not in name}
    only_head["lm_head.weight"] = Header((512, 64))
    assert build_model_graph(config, only_head).embedding.tensor_names == ("lm_head.weight",)


def test_names_without_the_base_prefix_and_old_buffers_are_understood() -> None:
    tensors = {name.removeprefix("transformer."): header for name, header in headers(SMALL_GPT2).items()}
    tensors |= {"h.0.attn.bias": Header((1, 1, 128, 128), "U8"), "h.0.attn.masked_bias": Header(())}
    graph = build_model_graph(SMALL_GPT2, tensors)
    assert "h.2.ln_1.bias" in graph.decoders[2].tensor_names
    assert graph.total_weight_bytes == graph_of(SMALL_GPT2).total_weight_bytes


def test_biases_of_a_llama_are_expected_where_the_config_has_them() -> None:
    config = {**SMALL_LLAMA, "attention_bias": True, "mlp_bias": True}
    extra = 4 * (64 + 32 + 32 + 64 + 176 + 176 + 64)
    assert graph_of(config).decoders[0].weight_bytes == graph_of().decoders[0].weight_bytes + extra


@pytest.mark.parametrize(
    ("config", "stored", "asked", "dtype", "size"),
    [
        ({}, "BF16", "auto", "float32", 4),  # SMALL_LLAMA says float32
        ({"dtype": None, "torch_dtype": "bfloat16"}, "F32", "auto", "bfloat16", 2),
        ({"dtype": None}, "F16", "auto", "float16", 2),
        ({"dtype": "torch.float16"}, "F32", "auto", "float16", 2),
        ({}, "BF16", "bfloat16", "bfloat16", 2),
    ],
)
def test_bytes_are_those_of_the_dtype_it_is_loaded_in(
    config: dict[str, object], stored: str, asked: str, dtype: str, size: int
) -> None:
    merged = {**SMALL_LLAMA, **config}
    graph = build_model_graph(merged, headers(merged, dtype=stored), dtype=asked)
    assert graph.dtype == dtype
    assert graph.embedding.weight_bytes == 512 * 64 * size
    assert graph.decoders[0].kv_bytes_per_token == 2 * 2 * 16 * size


def test_a_mask_that_lies_before_the_weights_is_not_what_they_are_computed_in() -> None:
    mask = Header((1, 1, 128, 128), "BOOL")
    weights = {"h.0.attn.bias": mask, **headers(SMALL_GPT2, dtype="BF16")}
    assert build_model_graph(SMALL_GPT2, weights).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            r"model_type 'mamba' is not supported; supported are: gemma2, gemma3_text, gpt2, ",
        ),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"num_hidden_layers": 10**6}, r"tensor model.layers.8.input_layernorm.weight is missing"),
        ({"model_type": None}, r"without model_type is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"LlamaForSequenceClassification is not a causal"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config: quantised weights are not supported"),
        ({"is_encoder_decoder": True}, r"is_encoder_decoder"),
        ({"hidden_size": "64"}, r"hidden_size must be a positive whole number, not '64'"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers must be a positive whole number, not 0"),
        ({"num_attention_heads": 5}, r"5 attention heads do not divide hidden size 64"),
        ({"num_key_value_heads": 3}, r"3 key-value heads do not divide 4 attention heads"),
        ({"mlp_bias": "yes"}, r"mlp_bias must be true or false, not 'yes'"),
        ({"dtype": "float64"}, r"dtype 'float64' is not supported; supported are: float32, bfloat16, float16"),
    ],
)
def test_what_a_config_must_not_say_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        build_model_graph({**SMALL_LLAMA, **change}, headers(SMALL_LLAMA))


def test_tensors_that_are_missing_unknown_or_different_are_named() -> None:
    tensors = headers(SMALL_LLAMA)
    name = "model.layers.5.self_attn.q_proj.weight"
    without = {other: header for other, header in tensors.items() if other != name}
    with pytest.raises(UnsupportedModel, match=rf"tensor {name} is missing"):
        build_model_graph(SMALL_LLAMA, without)
    with pytest.raises(UnsupportedModel, match=r"has shape \[64, 32\], config.json means \[64, 64\]"):
        build_model_graph(SMALL_LLAMA, {**tensors, name: Header((64, 32))})
    with pytest.raises(UnsupportedModel, match=r"stored as F8_E4M3; supported are: F32, BF16, F16"):
        build_model_graph(SMALL_LLAMA, {**tensors, name: Header((64, 64), "F8_E4M3")})
    with pytest.raises(UnsupportedModel, match=r"tensor model.x \(and 1 more\) does not belong"):
        build_model_graph(SMALL_LLAMA, {**tensors, "model.x": Header((1,)), "model.y": Header((1,))})
    with pytest.raises(UnsupportedModel, match=r"tensor lm_head.weight is missing"):
        build_model_graph(SMALL_LLAMA, {other: tensors[other] for other in tensors if other != "lm_head.weight"})


def test_a_kv_cache_has_positive_sizes() -> None:
    assert kv_cache_bytes_per_token(num_layers=32, num_kv_heads=8, head_dim=128, dtype_bytes=2) == 131_072
    with pytest.raises(ValueError, match="positive"):
        kv_cache_bytes_per_token(num_layers=0, num_kv_heads=8, head_dim=128, dtype_bytes=2)
