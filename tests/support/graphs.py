"""Model graphs for tests, from configs alone: tensor headers are made up to match, and no file is written."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from planner.architecture import Shape
from planner.model_families import read_architecture
from planner.model_graph import ModelGraph, build_model_graph

SMALL_LLAMA: dict[str, object] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "dtype": "float32",
}
SMALL_GPT2: dict[str, object] = {
    "model_type": "gpt2",
    "n_layer": 4,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 300,
}


@dataclass(frozen=True, slots=True)
class Header:
    shape: Shape
    dtype: str = "F32"


def headers(config: Mapping[str, object], *, dtype: str = "F32") -> dict[str, Header]:
    """Return the headers of a complete checkpoint of ``config``, as transformers would save it."""
    arch = read_architecture(config)
    table = arch.table_shape
    shapes: dict[str, Shape] = {arch.base_prefix + arch.embedding_table: table}
    shapes |= {arch.base_prefix + name: shape for name, shape in {**arch.embedding, **arch.head}.items()}
    for index, decoder in enumerate(arch.decoders):
        prefix = arch.base_prefix + arch.decoder_prefix.format(index)
        shapes |= {prefix + name: shape for name, shape in decoder.tensors.items()}
    if not arch.ties_embeddings:
        shapes[arch.head_table] = table
    return {name: Header(shape, dtype) for name, shape in shapes.items()}


def graph_of(config: Mapping[str, object] = SMALL_LLAMA, *, dtype: str = "F32") -> ModelGraph:
    return build_model_graph(config, headers(config, dtype=dtype))


def weighted_graph(
    decoder_bytes: list[int], *, embedding: int = 0, head: int = 0, shared: int = 0, kv_bytes_per_token: int = 1
) -> ModelGraph:
    """Return a graph whose layers weigh what is asked for; ``shared`` is part of both embedding and head."""
    graph = graph_of({**SMALL_LLAMA, "num_hidden_layers": len(decoder_bytes)})
    decoders = [
        replace(layer, weight_bytes=size, kv_bytes_per_token=kv_bytes_per_token)
        for layer, size in zip(graph.decoders, decoder_bytes, strict=True)
    ]
    ends = replace(graph.embedding, weight_bytes=embedding), replace(graph.head, weight_bytes=head)
    return replace(graph, layers=(ends[0], *decoders, ends[1]), shared_bytes=shared)
