"""The language model inside a checkpoint that sees images, too."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from engines.checkpoint import Checkpoint, TensorEntry
from engines.native.text_part import text_part
from planner.model_families import read_architecture
from planner.model_graph import build_model_graph

GEMMA_3_4B: Mapping[str, object] = {  # huggingface.co/google/gemma-3-4b-it: what it leaves out has the family's default
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
}


def checkpoint(config: Mapping[str, object], names: list[str]) -> Checkpoint:
    entry = TensorEntry(file=Path("model.safetensors"), dtype="BF16", shape=(2,), start=0, end=4)
    tensors = dict.fromkeys(names, entry)
    return Checkpoint(directory=Path("/"), config=config, generation_config={}, tensors=tensors, files=())


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_has_the_names_of_a_text_model_and_nothing_of_the_rest(prefix: str) -> None:
    stored = [f"{prefix}embed_tokens.weight", f"{prefix}layers.0.mlp.up_proj.weight", f"{prefix}norm.weight"]
    around = ["vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.mm_soft_emb_norm.weight"]
    assert list(text_part(checkpoint(GEMMA_3_4B, stored + around)).tensors) == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    ]


def test_gemma_3_4b_is_described_as_its_text_model() -> None:
    config = text_part(checkpoint(GEMMA_3_4B, [])).config
    assert config["eos_token_id"] == [1, 106]
    assert read_architecture(config).decoders
    graph = build_model_graph(config)
    assert (graph.model_type, graph.dtype, len(graph.decoders)) == ("gemma3_text", "bfloat16", 34)


def test_any_other_checkpoint_comes_back_unchanged() -> None:
    llama = checkpoint({"model_type": "llama"}, ["model.norm.weight"])
    assert text_part(llama) is llama
