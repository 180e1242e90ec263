"""The model graph: the layers of a model in order, with what each costs, from its config and tensor headers alone.

Nothing here reads a file; ``engines.checkpoint`` does. Bytes of weights are those they take when loaded in ``dtype``.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Protocol

from planner.errors import UnsupportedModel
from planner.layout import Pipeline
from planner.model_families import Architecture, Shape, read_architecture

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # names of safetensors
LOGITS_BYTES = 4  # logits are float32 whatever the model computes in


class TensorHeader(Protocol):
    """What a checkpoint says of a tensor before it is read."""

    @property
    def dtype(self) -> str:
        """Name as safetensors writes it, such as ``BF16``."""

    @property
    def shape(self) -> Shape: ...


class LayerKind(Enum):
    EMBEDDING = "embedding"
    DECODER = "decoder"
    HEAD = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The routed experts of a mixture: a token passes through ``active`` of ``count``. They stay in one layer."""

    count: int
    active: int
    bytes_each: int

    def expected_bytes_read(self, tokens: int) -> float:
        """Return the bytes of the experts that ``tokens`` choose, each token its own at random, all alike likely."""
        return self.count * self.bytes_each * (1 - (1 - self.active / self.count) ** tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The smallest unit that may be placed. Costs are of the layer alone on a device, per token where so named."""

    name: str  # "embedding", "decoder 3", "head"
    kind: LayerKind
    tensor_names: tuple[str, ...]  # in the checkpoint
    weight_bytes: int
    kv_bytes_per_token: int
    activation_bytes_per_token: int  # what it hands to the next layer; of the head, the logits of one position
    workspace_bytes_per_token: int  # estimated peak of temporary values while it computes
    flops_per_token: int  # without attention over the context
    attention_flops_per_context_token: int  # added per token computed and token attended to
    window_tokens: int | None = None  # a token attends to so many, itself included; None: to all before it
    experts: Experts | None = None

    def kv_bytes(self, context_tokens: int) -> int:
        """Return the KV cache that a sequence of ``context_tokens`` needs here: no more than its window."""
        kept = context_tokens if self.window_tokens is None else min(context_tokens, self.window_tokens)
        return self.kv_bytes_per_token * kept

    def weight_bytes_read(self, tokens: int) -> float:
        """Return the weights that a step of ``tokens`` reads: rows of the embedding, of the experts those chosen."""
        if self.kind is LayerKind.EMBEDDING:
            return float(min(self.weight_bytes, tokens * self.activation_bytes_per_token))
        if self.experts is None:
            return float(self.weight_bytes)
        resting = self.experts.count * self.experts.bytes_each
        return self.weight_bytes - resting + self.experts.expected_bytes_read(tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGraph:
    """The layers in order: embedding, decoders, head. A cut ``c`` makes decoder ``c`` the first of a stage.

    ``shared_bytes`` is the table that a tied embedding and head have in common: both layers count it, and a device that
    holds both holds it once.
    """

    model_type: str
    dtype: str
    layers: tuple[Layer, ...]
    legal_cuts: tuple[int, ...]
    shared_bytes: int
    hidden_size: int
    vocab_size: int
    max_context_tokens: int

    @property
    def embedding(self) -> Layer:
        return self.layers[0]

    @property
    def decoders(self) -> tuple[Layer, ...]:
        return self.layers[1:-1]

    @property
    def head(self) -> Layer:
        return self.layers[-1]

    @property
    def num_decoders(self) -> int:
        return len(self.layers) - 2

    @property
    def tied(self) -> bool:
        return self.shared_bytes > 0

    @property
    def total_weight_bytes(self) -> int:
        return self.weight_bytes(self.layers)

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(layer.kv_bytes_per_token for layer in self.layers)

    def kv_bytes(self, context_tokens: int) -> int:
        """Return the KV cache that one sequence of ``context_tokens`` needs over all layers, windows respected."""
        return sum(layer.kv_bytes(context_tokens) for layer in self.layers)

    def weight_bytes(self, layers: Collection[Layer]) -> int:
        """Return the weights of distinct ``layers`` together on one device: a tied table counts once."""
        both = self.embedding in layers and self.head in layers
        return sum(layer.weight_bytes for layer in layers) - (self.shared_bytes if both else 0)

    def stage_layers(self, pipeline: Pipeline, index: int) -> tuple[Layer, ...]:
        """Return the layers that stage ``index`` of ``pipeline`` holds, in order."""
        stage = pipeline.stages[index]
        first = (self.embedding,) if index == 0 else ()
        last = (self.head,) if index == pipeline.granularity - 1 else ()
        return first + self.decoders[stage.first_decoder : stage.end_decoder] + last


def kv_cache_bytes_per_token(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
    """Return the KV-cache footprint of one token across ``num_layers`` layers, in bytes.

    A layer keeps a key and a value of shape ``(num_tokens, num_kv_heads, head_dim)``, hence the factor two.

    Raises:
        ValueError: An argument is not positive.

    Source: Kwon et al., PagedAttention, SOSP 2023, section 3.
    """
    if min(num_layers, num_kv_heads, head_dim, dtype_bytes) < 1:
        raise ValueError("every size of a KV cache must be positive")
    return 2 * num_layers * num_kv_heads * head_dim * dtype_bytes


def build_model_graph(
    config: Mapping[str, object], tensors: Mapping[str, TensorHeader], *, dtype: str = "auto"
) -> ModelGraph:
    """Return the model graph of a parsed config.json and its checkpoint's headers, checked against each other.

    ``dtype`` is what the model computes and keeps weights and KV cache in: ``float32``, ``bfloat16``, ``float16``, or
    ``auto`` for the config's own.

    Raises:
        UnsupportedModel: The family, a feature, a dtype, or a tensor that is missing, unknown or of another shape.
    """
    arch = read_architecture(config)
    computed = _compute_dtype(config, tensors) if dtype == "auto" else dtype
    if computed not in DTYPE_BYTES:
        raise UnsupportedModel(f"dtype {computed!r} is not supported; supported are: {', '.join(DTYPE_BYTES)}")
    names = _Names(arch, tensors)
    names.refuse_strangers()
    size = DTYPE_BYTES[computed]
    return ModelGraph(
        model_type=str(config["model_type"]),
        dtype=computed,
        layers=(
            _embedding(arch, names, size),
            *(_decoder(arch, names, size, index) for index in range(arch.num_decoders)),
            _head(arch, names, size),
        ),
        legal_cuts=tuple(range(1, arch.num_decoders)),
        shared_bytes=arch.vocab_size * arch.hidden_size * size if names.tied else 0,
        hidden_size=arch.hidden_size,
        vocab_size=arch.vocab_size,
        max_context_tokens=arch.max_context_tokens,
    )


class _Names:
    """Finds an architecture's tensors in a checkpoint, whether it was saved with the base model's prefix or not."""

    def __init__(self, arch: Architecture, tensors: Mapping[str, TensorHeader]) -> None:
        self.tensors = tensors
        prefixed = any(name.startswith(arch.base_prefix) for name in tensors)
        self.prefix = arch.base_prefix if prefixed else ""
        self.embedding_table = self.prefix + arch.embedding_table
        self.head_table = arch.head_table
        self.table_shape = (arch.vocab_size, arch.hidden_size)
        self.arch = arch
        # transformers ties two tables that are both saved only when they are equal: kept apart, both cases are right
        self.tied = arch.ties_embeddings and not (self.embedding_table in tensors and self.head_table in tensors)
        if self.tied:  # one table under either name
            table = self.head_table if self.head_table in tensors else self.embedding_table
            self.embedding_table = self.head_table = table

    def expected(self) -> Iterator[tuple[str, Shape]]:
        """Yield every tensor that the model needs."""
        for table in dict.fromkeys((self.embedding_table, self.head_table)):
            yield table, self.table_shape
        yield from self.under("", self.arch.embedding)
        for index in range(self.arch.num_decoders):
            yield from self.under(self.arch.decoder_prefix.format(index), self.arch.decoder)
        yield from self.under("", self.arch.head)

    def under(self, prefix: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
        return ((f"{self.prefix}{prefix}{name}", shape) for name, shape in shapes.items())

    def refuse_strangers(self) -> None:
        """Check that the checkpoint holds what the model needs, and nothing that would be left out unnoticed."""
        expected = dict(self.expected())
        for name, shape in expected.items():
            header = self.tensors.get(name)
            if header is None:
                raise UnsupportedModel(f"tensor {name} is missing from the checkpoint")
            if tuple(header.shape) != shape:
                raise UnsupportedModel(f"tensor {name} has shape {list(header.shape)}, config.json means {list(shape)}")
            if header.dtype not in STORED_DTYPES:
                stored = ", ".join(STORED_DTYPES)
                raise UnsupportedModel(f"tensor {name} is stored as {header.dtype}; supported are: {stored}")
        unknown = [name for name in self.tensors if name not in expected and not name.endswith(self.arch.buffers)]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise UnsupportedModel(f"tensor {unknown[0]}{more} does not belong to the model that config.json describes")


def _embedding(arch: Architecture, names: _Names, size: int) -> Layer:
    shapes = dict([(names.embedding_table, names.table_shape), *names.under("", arch.embedding)])
    return Layer(
        name="embedding",
        kind=LayerKind.EMBEDDING,
        tensor_names=tuple(shapes),
        weight_bytes=_weight_bytes(shapes, size),
        kv_bytes_per_token=0,
        activation_bytes_per_token=arch.hidden_size * size,
        workspace_bytes_per_token=2 * arch.hidden_size * size,
        flops_per_token=0,
        attention_flops_per_context_token=0,
    )


def _decoder(arch: Architecture, names: _Names, size: int, index: int) -> Layer:
    shapes = dict(names.under(arch.decoder_prefix.format(index), arch.decoder))
    attention_width = (2 * arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim  # queries, output, keys, values
    return Layer(
        name=f"decoder {index}",
        kind=LayerKind.DECODER,
        tensor_names=tuple(shapes),
        weight_bytes=_weight_bytes(shapes, size),
        kv_bytes_per_token=kv_cache_bytes_per_token(
            num_layers=1, num_kv_heads=arch.num_kv_heads, head_dim=arch.head_dim, dtype_bytes=size
        ),
        activation_bytes_per_token=arch.hidden_size * size,
        workspace_bytes_per_token=(2 * arch.hidden_size + max(attention_width, 3 * arch.intermediate_size)) * size,
        flops_per_token=2 * sum(prod(shape) for shape in shapes.values() if len(shape) == 2),
        attention_flops_per_context_token=4 * arch.num_heads * arch.head_dim,
    )


def _head(arch: Architecture, names: _Names, size: int) -> Layer:
    shapes = dict([*names.under("", arch.head), (names.head_table, names.table_shape)])
    return Layer(
        name="head",
        kind=LayerKind.HEAD,
        tensor_names=tuple(shapes),
        weight_bytes=_weight_bytes(shapes, size),
        kv_bytes_per_token=0,
        activation_bytes_per_token=arch.vocab_size * LOGITS_BYTES,
        workspace_bytes_per_token=2 * arch.hidden_size * size + 2 * arch.vocab_size * LOGITS_BYTES,
        flops_per_token=2 * arch.vocab_size * arch.hidden_size,
        attention_flops_per_context_token=0,
    )


def _weight_bytes(shapes: Mapping[str, Shape], size: int) -> int:
    return size * sum(prod(shape) for shape in shapes.values())


def _compute_dtype(config: Mapping[str, object], tensors: Mapping[str, TensorHeader]) -> str:
    """Return the dtype that config.json names, else that of the first tensor."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named is not None:
        return str(named).removeprefix("torch.")
    stored = next((header.dtype for header in tensors.values()), "F32")
    return STORED_DTYPES.get(stored, stored)
