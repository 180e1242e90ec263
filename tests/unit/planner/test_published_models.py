"""Well-known models, from their config.json alone: parameters as published, windows, experts, KV cache, legal cuts."""

from collections.abc import Mapping
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.architecture import Config, kv_sources, legal_cuts
from planner.errors import UnsupportedModel
from planner.estimated_graph import estimate_model_graph
from planner.layout import pipeline_of
from planner.model_graph import DTYPE_BYTES, build_model_graph
from tests.support.graphs import headers
from tests.support.published_models import (
    GEMMA_2_27B,
    GEMMA_3_1B,
    LLAMA_3_70B,
    MISTRAL_7B,
    MIXTRAL_8X7B,
    OPT_66B,
    PUBLISHED,
    QWEN_2_5_72B,
    QWEN_3_30B_A3B,
)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_config_alone_gives_the_published_number_of_parameters(name: str) -> None:
    published = PUBLISHED[name]
    graph = build_model_graph(published.config)
    parameters = graph.total_weight_bytes / DTYPE_BYTES[graph.dtype]
    assert abs(parameters / published.parameters - 1) < 0.001, published.source


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_headers_of_its_checkpoint_give_the_same_graph(name: str) -> None:
    config = {**PUBLISHED[name].config, "num_hidden_layers": 4}
    assert build_model_graph(config, headers(config, dtype="BF16")) == build_model_graph(config)


def test_kv_cache_of_a_token_as_published_figures_have_it() -> None:
    """Llama-3-70B: 320 KiB a token in 16 bit; OPT-66B without grouped queries: 2.25 MiB."""
    assert build_model_graph(LLAMA_3_70B.config).kv_bytes_per_token == 320 << 10
    assert build_model_graph(OPT_66B.config).kv_bytes_per_token == 2 * 64 * 9216 * 2


def test_windows_bound_the_kv_cache_of_every_other_decoder_of_gemma() -> None:
    graph = build_model_graph(GEMMA_2_27B.config)
    assert [decoder.window_tokens for decoder in graph.decoders[:4]] == [4096, None, 4096, None]
    each = graph.decoders[0].kv_bytes_per_token
    assert graph.kv_bytes(1000) == 46 * 1000 * each
    assert graph.kv_bytes(8192) == 23 * (4096 + 8192) * each


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({**MISTRAL_7B.config, "num_hidden_layers": 2}, [4096, 4096]),
        ({**MISTRAL_7B.config, "num_hidden_layers": 2, "sliding_window": None}, [None, None]),
        ({**QWEN_2_5_72B.config, "num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 1,
          "sliding_window": 512}, [None, 512, 512]),
        ({**GEMMA_2_27B.config, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
         [None, 4096]),
        ({**GEMMA_3_1B.config, "num_hidden_layers": 7}, [512, 512, 512, 512, 512, None, 512]),
    ],
)  # fmt: skip
def test_windows_are_where_the_config_says(config: Mapping[str, object], windows: list[int | None]) -> None:
    assert [decoder.window_tokens for decoder in build_model_graph(config).decoders] == windows


def test_a_mixture_is_one_layer_that_computes_with_few_of_its_experts() -> None:
    graph = build_model_graph(MIXTRAL_8X7B.config)
    decoder = graph.decoders[0]
    assert decoder.experts is not None
    assert (decoder.experts.count, decoder.experts.active) == (8, 2)
    assert decoder.experts.bytes_each == 3 * 4096 * 14336 * 2
    active = sum(layer.flops_per_token for layer in graph.layers) / 2 + 32000 * 4096
    assert active == pytest.approx(12.9e9, rel=0.01)  # "12.9 B active parameters": arXiv 2401.04088
    assert len(graph.legal_cuts) == 31  # between decoders: experts are never apart


def test_some_decoders_of_a_mixture_may_be_dense() -> None:
    config = {**QWEN_3_30B_A3B.config, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    kinds = [decoder.experts is not None for decoder in build_model_graph(config).decoders]
    assert kinds == [False, True, False, False]
    active = build_model_graph(QWEN_3_30B_A3B.config)
    assert sum(layer.flops_per_token for layer in active.layers) / 2 == pytest.approx(3.04e9, rel=0.01)


def test_small_opts_project_their_embedding() -> None:
    """OPT-350M: tables of width 512, no norm at the end; 331,196,416 parameters (its safetensors index)."""
    config = {
        "model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "word_embed_proj_dim": 512, "do_layer_norm_before": False, "torch_dtype": "float16",
    }  # fmt: skip
    graph = build_model_graph(config)
    assert graph.total_weight_bytes == 2 * 331_196_416
    assert graph.shared_bytes == 2 * 50272 * 512


def test_tied_ends_may_be_cut_apart_but_then_both_hold_the_table() -> None:
    graph = build_model_graph(GEMMA_2_27B.config)
    assert graph.tied
    two = pipeline_of(device_ids=["a", "b"], cuts=[23], num_decoders=46)
    apart = sum(graph.weight_bytes(graph.stage_layers(two, index)) for index in range(2))
    assert apart == graph.total_weight_bytes + 256000 * 4608 * 4


def test_decoders_that_share_a_kv_cache_stay_together() -> None:
    """Gemma 3n: the last decoders read the cache of the last one before them with the same attention."""
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    config = Config({"num_kv_shared_layers": 3, "layer_types": types})
    assert kv_sources(config, 9) == (None,) * 6 + (4, 4, 5)
    assert legal_cuts(kv_sources(config, 9)) == (1, 2, 3, 4)
    pairs = kv_sources(Config({"use_cla": True, "cla_share_factor": 2}), 6)
    assert pairs == (None, 0, None, 2, None, 4)
    assert legal_cuts(pairs) == (2, 4)


def test_a_shared_kv_cache_is_counted_once_also_where_only_the_engine_knows_the_family() -> None:
    config = {
        "model_type": "hunyuan", "num_hidden_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9,
        "use_cla": True, "cla_share_factor": 2,
    }  # fmt: skip
    graph = estimate_model_graph(config, {})
    assert graph.legal_cuts == (2,)
    assert graph.kv_bytes_per_token == 2 * graph.decoders[0].kv_bytes_per_token


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12))
def test_no_legal_cut_parts_a_decoder_from_its_cache(raw: list[int]) -> None:
    sources = [None if back == 0 or back > index else index - back for index, back in enumerate(raw)]
    for cut in legal_cuts(sources):
        assert not any(source is not None and source < cut <= index for index, source in enumerate(sources))
    if all(source is None for source in sources):
        assert legal_cuts(sources) == tuple(range(1, len(sources)))


def test_experts_are_counted_under_the_name_that_transformers_5_saves() -> None:
    config = {key: value for key, value in QWEN_3_30B_A3B.config.items() if key != "num_experts"}
    assert build_model_graph({**config, "num_local_experts": 128}) == build_model_graph(QWEN_3_30B_A3B.config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**MIXTRAL_8X7B.config, "num_experts_per_tok": 9}, "cannot pass through 9 of 8 experts"),
        ({**QWEN_3_30B_A3B.config, "mlp_only_layers": "3"}, "mlp_only_layers must be a list of layer numbers"),
        (
            {**GEMMA_2_27B.config, "layer_types": ["full_attention"]},
            "layer_types must name the attention of each of 46",
        ),
        ({**MISTRAL_7B.config, "sliding_window": 0}, "sliding_window must be a positive whole number"),
        ({**OPT_66B.config, "layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine false"),
    ],
)
def test_what_cannot_be_is_named(config: Mapping[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        build_model_graph(config)


def test_weights_of_a_layer_are_its_tensors() -> None:
    """The parts of a mixture, experts and the rest, make up the layer."""
    config = {**QWEN_3_30B_A3B.config, "num_hidden_layers": 1}
    shapes = headers(config)
    layer = build_model_graph(config).decoders[0]
    assert layer.weight_bytes == 2 * sum(prod(shapes[name].shape) for name in layer.tensor_names)
    assert layer.experts is not None
    assert layer.weight_bytes_read(10_000) == pytest.approx(layer.weight_bytes)
