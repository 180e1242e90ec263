"""What the native engine cannot do exactly is refused by name, before any weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, MambaConfig, PretrainedConfig

from engines.errors import UnsupportedByEngine
from engines.native.attention import ATTENTION_NAME, register
from engines.native.families import FAMILIES, build_family
from engines.native.family import Family
from planner import model_families
from tests.support.family_checkpoints import KINDS, MAX_MODEL_LEN, NUM_DECODERS, config_of


def llama(**overrides: Any) -> LlamaConfig:
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**(sizes | overrides))


def gpt2(**overrides: Any) -> GPT2Config:
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 50, "n_positions": 64}
    return GPT2Config(**(sizes | overrides))


def build(config: PretrainedConfig, *, dtype: torch.dtype = torch.float32, max_model_len: int = 32) -> Family:
    return build_family(config, attention=register(None), max_model_len=max_model_len, dtype=dtype)


def changed(kind: str, **changes: Any) -> PretrainedConfig:
    """Return the configuration of a kind with changes that its class would refuse or hide."""
    config = config_of(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MambaConfig(num_hidden_layers=1, hidden_size=8), "model type 'mamba' is not supported yet .*gemma2, gemma3"),
        (changed("llama", rope_parameters={"rope_type": "spiral"}), "rope type 'spiral' is not supported yet"),
        (changed("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention is not supported"),
        (changed("qwen2", layer_types=["full_attention", "chunked_attention"]), "attention 'chunked_attention'"),
        (changed("opt", layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine false"),
        (llama(pretraining_tp=2), "pretraining_tp"),
        (llama(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
        (gpt2(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
        (gpt2(add_cross_attention=True), "cross-attention"),
        (gpt2(reorder_and_upcast_attn=True), "reorder_and_upcast_attn"),
    ],
    ids=[
        "type",
        "rope",
        "bidirectional",
        "attention",
        "affine",
        "pretraining-tp",
        "quantised-llama",
        "quantised-gpt2",
        "cross-attention",
        "upcast",
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: PretrainedConfig, words: str) -> None:
    with pytest.raises(UnsupportedByEngine, match=words):
        build(config)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.5] * 8,
            "long_factor": [3.0] * 8,
            "factor": 2.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_rotary_positions_are_those_of_transformers(rope: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = llama(rope_parameters=rope)
    positions = torch.tensor([0, 5, 31, 7])
    cos, sin = build(config).step_arguments(positions)[1]["position_embeddings"]
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    assert torch.equal(cos, expected_cos)
    assert torch.equal(sin, expected_sin)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.3},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda scaling: str(scaling.get("rope_type", scaling.get("type"))),
)
def test_rotary_positions_are_read_as_published_files_say_them(scaling: dict[str, Any], tmp_path: Path) -> None:
    """``rope_theta`` and ``rope_scaling`` side by side, where newer files have ``rope_parameters``."""
    new = llama(rope_parameters={**scaling, "rope_type": scaling.get("rope_type", "linear"), "rope_theta": 1e3})
    said = llama().to_dict()
    del said["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**said, "rope_theta": 1e3, "rope_scaling": scaling}))
    old = AutoConfig.from_pretrained(tmp_path)
    positions = torch.tensor([0, 5, 31, 7])
    tables, expected, plain = (
        build(config).step_arguments(positions)[1]["position_embeddings"] for config in (old, new, llama())
    )
    assert all(map(torch.equal, tables, expected))
    assert not torch.equal(tables[0], plain[0])


def test_each_kind_of_attention_has_rotary_positions_of_its_own() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    config = config_of("gemma3_text")
    positions = torch.tensor([0, 5, 31, 7])
    arguments = build(config).step_arguments(positions)
    rotary = Gemma3RotaryEmbedding(config)
    for given, kind in zip(arguments, config.layer_types, strict=True):
        expected = rotary(torch.zeros(1), positions[None], kind)
        assert all(map(torch.equal, given["position_embeddings"], expected))
    assert not torch.equal(arguments[0]["position_embeddings"][0], arguments[2]["position_embeddings"][0])


@pytest.mark.parametrize(("rope", "begins"), [("longrope", 128), ("dynamic", 256)])
def test_rotary_positions_that_scale_with_a_sequence_are_refused_beyond_the_length_at_which_they_begin(
    rope: str, begins: int
) -> None:
    """Cached keys of a growing sequence would have been rotated otherwise: transformers, too, computes them again."""
    config = config_of("phi3")
    if rope == "dynamic":
        config = changed("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert build(config, max_model_len=begins).max_model_len == begins
    with pytest.raises(
        UnsupportedByEngine, match=rf"'{rope}' is supported up to the {begins} .* max_model_len = {begins}"
    ):
        build(config, max_model_len=begins + 1)


def test_the_families_are_those_that_the_planner_knows() -> None:
    assert set(FAMILIES) == set(model_families.FAMILIES) == {kind.partition("-")[0] for kind in KINDS}


@pytest.mark.parametrize(
    ("config", "kv_heads", "head_dim"),
    [(llama(), 2, 16), (llama(head_dim=24), 2, 24), (gpt2(), 4, 16)],
    ids=["llama", "head-dim", "gpt2"],
)
def test_sizes_come_from_the_config(config: PretrainedConfig, kv_heads: int, head_dim: int) -> None:
    family = build(config)
    assert (family.num_kv_heads, family.head_dim) == (kv_heads, head_dim)
    assert (family.num_decoders, family.hidden_size) == (2, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_has_no_weights_and_pages_its_attention(kind: str) -> None:
    family = build(config_of(kind), dtype=torch.bfloat16)
    parameters = list(family.model.parameters())
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in parameters)
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert family.model.config._attn_implementation == ATTENTION_NAME
    assert not family.model.training


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_hold_every_parameter_once(kind: str) -> None:
    family = build(config_of(kind))
    layers = ["embedding", *map(str, range(NUM_DECODERS)), "head"]
    names = [
        f"{prefix}.{name}"
        for layer in layers
        for prefix, module in family.modules(layer).items()
        for name, _ in module.named_parameters()
    ]
    assert sorted(names) == sorted(name for name, _ in family.model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("kind", KINDS)
def test_no_decoder_has_a_buffer_that_would_stay_without_memory(kind: str) -> None:
    family = build(config_of(kind), max_model_len=MAX_MODEL_LEN)
    for layer in (*map(str, range(NUM_DECODERS)), "head"):
        assert [name for module in family.modules(layer).values() for name, _ in module.named_buffers()] == []
