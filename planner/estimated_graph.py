"""The model graph of a model whose family is not known here, estimated from what its files say of themselves.

Enough to cut it into stages and to size its KV cache where the engine, such as vLLM, knows the family itself. Tensors
are sorted by name: those of decoder ``i`` have ``layers.i.`` (or ``h.i.``) in theirs, those of the head come after the
decoders; everything else, a vision tower too, stays with the embedding.
"""

import re
from collections.abc import Iterable, Mapping
from math import prod

from planner.architecture import Config, kv_sources, legal_cuts
from planner.checkpoint_names import STORED_DTYPES, TensorHeader
from planner.errors import UnsupportedModel
from planner.model_graph import DTYPE_BYTES, LayerBuilder, ModelGraph

_DECODER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_NOT_DECODER = re.compile(r"vision|visual|audio|encoder")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|ln_f|final_layer_norm|norm|embed_out)\.")
_QUANTISED_BYTES = {"I64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}  # others take one byte: I8, U8, F8_*
_PACKED = ("I32", "U32", "U8")  # several weights to a number


def estimate_model_graph(
    config: Mapping[str, object], tensors: Mapping[str, TensorHeader], *, dtype: str = "auto"
) -> ModelGraph:
    """Return an estimate; ``dtype`` as in ``build_model_graph``. All tensors of a decoder count for every token.

    Raises:
        UnsupportedModel: config.json does not say how many decoders there are, or how large.
    """
    nested = config.get("text_config")
    values = {**config, **nested} if isinstance(nested, Mapping) else config
    computed = str(values.get("dtype") or values.get("torch_dtype") or "bfloat16") if dtype == "auto" else dtype
    computed = computed.removeprefix("torch.")
    builder, decoders, inner, context = _read_sizes(values, dtype_bytes=DTYPE_BYTES.get(computed, 2))
    sources = kv_sources(Config(values), decoders)
    held, bits = _sort(tensors, decoders), _weight_bits(values)
    table = builder.vocab_size * builder.hidden_size
    tied = values.get("tie_word_embeddings") is True or not any("lm_head" in name for name in tensors)

    def weighs(place: int) -> int:
        return sum(_bytes(tensors[name], builder.dtype_bytes) for name in held[place])

    shared = table * builder.dtype_bytes if tied else 0
    return ModelGraph(
        model_type=str(config.get("model_type", "unknown")),
        dtype=computed,
        layers=(
            builder.embedding(held[-1], weight_bytes=weighs(-1)),
            *(
                builder.decoder(
                    index,
                    held[index],
                    weight_bytes=weighs(index),
                    matrix_parameters=sum(
                        _parameters(tensors[name], bits=bits) for name in held[index] if len(tensors[name].shape) == 2
                    ),
                    inner_size=inner,
                    has_kv=sources[index] is None,
                )
                for index in range(decoders)
            ),
            builder.head(held[decoders], weight_bytes=weighs(decoders) + shared, matrix_parameters=table),
        ),
        legal_cuts=legal_cuts(sources),
        shared_bytes=shared,
        hidden_size=builder.hidden_size,
        vocab_size=builder.vocab_size,
        max_context_tokens=context,
    )


def _read_sizes(values: Mapping[str, object], *, dtype_bytes: int) -> tuple[LayerBuilder, int, int, int]:
    """Return what config.json says under any of the names that families use; the last three: decoders, MLP, context."""

    def read(*names: str, default: int | None = None) -> int:
        for name in names:
            value = values.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        if default is None:
            raise UnsupportedModel(f"config.json does not say {names[0]}")
        return default

    decoders = read("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    hidden = read("hidden_size", "n_embd", "d_model")
    heads = read("num_attention_heads", "n_head", "n_heads")
    builder = LayerBuilder(
        hidden_size=hidden,
        vocab_size=read("vocab_size"),
        num_heads=heads,
        num_kv_heads=read("num_key_value_heads", "num_kv_heads", "n_head_kv", default=heads),
        head_dim=read("head_dim", default=max(1, hidden // heads)),
        dtype_bytes=dtype_bytes,
    )
    inner = read("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    return builder, decoders, inner, read("max_position_embeddings", "n_positions", "max_sequence_length", default=2048)


def _sort(names: Iterable[str], decoders: int) -> dict[int, list[str]]:
    """Return tensor names by decoder; -1 is the embedding, ``decoders`` the head."""
    found: dict[int, list[str]] = {index: [] for index in range(-1, decoders + 1)}
    for name in names:
        place = -1
        if not _NOT_DECODER.search(name):
            if (decoder := _DECODER.search(name)) is not None:
                place = int(decoder[1]) if int(decoder[1]) < decoders else -1
            elif _HEAD.search(name):
                place = decoders
        found[place].append(name)
    return found


def _weight_bits(values: Mapping[str, object]) -> int:
    """Return the bits of a quantised weight, as GPTQ, AWQ and compressed-tensors say it; 0 where none does."""
    quantisation = values.get("quantization_config")
    if not isinstance(quantisation, Mapping):
        return 0
    groups = quantisation.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    said = [quantisation.get("bits"), quantisation.get("w_bit")]
    said += [each.get("num_bits") for each in weights if isinstance(each, Mapping)]
    return next((bits for bits in said if isinstance(bits, int) and bits > 0), 0)


def _parameters(matrix: TensorHeader, *, bits: int) -> int:
    """Return how many weights a matrix holds: of few ``bits``, several are packed into each number."""
    per_number = 8 * _QUANTISED_BYTES.get(matrix.dtype, 1) // bits if matrix.dtype in _PACKED and bits else 1
    return prod(matrix.shape) * max(1, per_number)


def _bytes(header: TensorHeader, size: int) -> int:
    count = prod(header.shape)
    return count * (size if header.dtype in STORED_DTYPES else _QUANTISED_BYTES.get(header.dtype, 1))
