"""The model graph of a model whose family is not known here, estimated from what its files say of themselves.

Enough to cut it into stages and to size its KV cache where the engine, such as vLLM, knows the family itself. Tensors
are sorted by name: those of decoder ``i`` have ``layers.i.`` (or ``h.i.``) in theirs, those of the head come after the
decoders; everything else, a vision tower too, stays with the embedding.
"""

import re
from collections.abc import Iterable, Mapping
from math import prod

from planner.errors import UnsupportedModel
from planner.model_graph import (
    DTYPE_BYTES,
    LOGITS_BYTES,
    STORED_DTYPES,
    Layer,
    LayerKind,
    ModelGraph,
    TensorHeader,
    kv_cache_bytes_per_token,
)

_DECODER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_NOT_DECODER = re.compile(r"vision|visual|audio|encoder")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|ln_f|final_layer_norm|norm|embed_out)\.")
_QUANTISED_BYTES = {"I64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}  # others take one byte: I8, U8, F8_*


def estimate_model_graph(
    config: Mapping[str, object], tensors: Mapping[str, TensorHeader], *, dtype: str = "auto"
) -> ModelGraph:
    """Return an estimate; ``dtype`` as in ``build_model_graph``.

    Raises:
        UnsupportedModel: config.json does not say how many decoders there are, or how large.
    """
    nested = config.get("text_config")
    values = {**config, **nested} if isinstance(nested, Mapping) else config
    sizes = _Sizes(values)
    computed = str(values.get("dtype") or values.get("torch_dtype") or "bfloat16") if dtype == "auto" else dtype
    computed = computed.removeprefix("torch.")
    size = DTYPE_BYTES.get(computed, 2)
    sorted_names = _sort(tensors, sizes.decoders)
    tied = values.get("tie_word_embeddings") is True or not any("lm_head" in name for name in tensors)
    return ModelGraph(
        model_type=str(config.get("model_type", "unknown")),
        dtype=computed,
        layers=(
            sizes.layer("embedding", LayerKind.EMBEDDING, sorted_names[-1], tensors, size),
            *(
                sizes.layer(f"decoder {index}", LayerKind.DECODER, sorted_names[index], tensors, size)
                for index in range(sizes.decoders)
            ),
            sizes.layer("head", LayerKind.HEAD, sorted_names[sizes.decoders], tensors, size, tied=tied),
        ),
        legal_cuts=tuple(range(1, sizes.decoders)),
        shared_bytes=sizes.vocab * sizes.hidden * size if tied else 0,
        hidden_size=sizes.hidden,
        vocab_size=sizes.vocab,
        max_context_tokens=sizes.context,
    )


class _Sizes:
    """What config.json says, under any of the names that families use."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values
        self.decoders = self._read("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        self.hidden = self._read("hidden_size", "n_embd", "d_model")
        self.vocab = self._read("vocab_size")
        self.heads = self._read("num_attention_heads", "n_head", "n_heads")
        self.kv_heads = self._read("num_key_value_heads", "num_kv_heads", "n_head_kv", default=self.heads)
        self.head_dim = self._read("head_dim", default=max(1, self.hidden // self.heads))
        self.inner = self._read("intermediate_size", "n_inner", "ffn_dim", default=4 * self.hidden)
        self.context = self._read("max_position_embeddings", "n_positions", "max_sequence_length", default=2048)

    def _read(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self._values.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        if default is None:
            raise UnsupportedModel(f"config.json does not say {names[0]}")
        return default

    def layer(
        self,
        name: str,
        kind: LayerKind,
        names: Iterable[str],
        tensors: Mapping[str, TensorHeader],
        size: int,
        *,
        tied: bool = False,
    ) -> Layer:
        held = tuple(names)
        decodes, ends = kind is LayerKind.DECODER, kind is LayerKind.HEAD
        widest = max((2 * self.heads + 2 * self.kv_heads) * self.head_dim, 3 * self.inner)
        table = self.vocab * self.hidden
        matrices = sum(prod(tensors[each].shape) for each in held if len(tensors[each].shape) == 2)
        kv = kv_cache_bytes_per_token(
            num_layers=1, num_kv_heads=self.kv_heads, head_dim=self.head_dim, dtype_bytes=size
        )
        return Layer(
            name=name,
            kind=kind,
            tensor_names=held,
            weight_bytes=sum(_bytes(tensors[each], size) for each in held) + (table * size if tied else 0),
            kv_bytes_per_token=kv if decodes else 0,
            activation_bytes_per_token=self.vocab * LOGITS_BYTES if ends else self.hidden * size,
            workspace_bytes_per_token=2 * self.hidden * size
            + (widest * size if decodes else 2 * self.vocab * LOGITS_BYTES if ends else 0),
            flops_per_token=2 * (matrices if decodes else table if ends else 0),
            attention_flops_per_context_token=4 * self.heads * self.head_dim if decodes else 0,
        )


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


def _bytes(header: TensorHeader, size: int) -> int:
    count = prod(header.shape)
    return count * (size if header.dtype in STORED_DTYPES else _QUANTISED_BYTES.get(header.dtype, 1))
