"""The model graph: the layers of a model in order, with what each costs, from its config and tensor headers alone.

Nothing here reads a file; ``engines.checkpoint`` does. Bytes of weights are those they take when loaded in ``dtype``.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod

from planner.architecture import Architecture, Shape, legal_cuts
from planner.checkpoint_names import STORED_DTYPES, CheckpointNames, TensorHeader
from planner.errors import UnsupportedModel
from planner.layout import Pipeline
from planner.model_families import read_architecture

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGITS_BYTES = 4  # logits are float32 whatever the model computes in


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
    holds both holds it once. Those of the two that are ``on_every_stage`` the engine has in memory there, although only
    the first or the last computes with them.
    """

    model_type: str
    dtype: str
    layers: tuple[Layer, ...]
    legal_cuts: tuple[int, ...]
    shared_bytes: int
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    on_every_stage: frozenset[LayerKind] = frozenset()

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
    def copied_bytes(self) -> int:
        """What is on every stage, whatever its layers are."""
        return self.weight_bytes([layer for layer in self.layers if layer.kind in self.on_every_stage])

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

    def placed_bytes(self, layers: Collection[Layer]) -> int:
        """Return the weights of ``layers`` that are on a device because they were placed there, each by itself."""
        return sum(layer.weight_bytes for layer in layers if layer.kind not in self.on_every_stage)

    def stage_layers(self, pipeline: Pipeline, index: int) -> tuple[Layer, ...]:
        """Return the layers that stage ``index`` of ``pipeline`` computes with, in order."""
        return self._layers_of(pipeline, index, frozenset())

    def held_layers(self, pipeline: Pipeline, index: int) -> tuple[Layer, ...]:
        """Return the layers that stage ``index`` of ``pipeline`` has in memory, in order."""
        return self._layers_of(pipeline, index, self.on_every_stage)

    def _layers_of(self, pipeline: Pipeline, index: int, everywhere: frozenset[LayerKind]) -> tuple[Layer, ...]:
        stage = pipeline.stages[index]
        first = (self.embedding,) if index == 0 or LayerKind.EMBEDDING in everywhere else ()
        last = (self.head,) if index == pipeline.granularity - 1 or LayerKind.HEAD in everywhere else ()
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
    config: Mapping[str, object],
    tensors: Mapping[str, TensorHeader] | None = None,
    *,
    dtype: str = "auto",
) -> ModelGraph:
    """Return the model graph of a parsed config.json and its checkpoint's headers, checked against each other.

    Without ``tensors`` the config alone says what there is. ``dtype`` is what the model computes and keeps weights and
    KV cache in: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the config's own.

    Raises:
        UnsupportedModel: The family, a feature, a dtype, or a tensor that is missing, unknown or of another shape.
    """
    arch = read_architecture(config)
    computed = _compute_dtype(config, tensors or {}) if dtype == "auto" else dtype
    if computed not in DTYPE_BYTES:
        raise UnsupportedModel(f"dtype {computed!r} is not supported; supported are: {', '.join(DTYPE_BYTES)}")
    names = CheckpointNames(arch, tensors)
    builder = LayerBuilder(
        hidden_size=arch.hidden_size,
        vocab_size=arch.vocab_size,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        dtype_bytes=DTYPE_BYTES[computed],
    )
    table = prod(arch.table_shape)
    return ModelGraph(
        model_type=str(config["model_type"]),
        dtype=computed,
        layers=(
            _embedding(arch, names, builder),
            *(_decoder(arch, names, builder, index) for index in range(arch.num_decoders)),
            _head(arch, names, builder),
        ),
        legal_cuts=legal_cuts([decoder.kv_source for decoder in arch.decoders]),
        shared_bytes=table * builder.dtype_bytes if names.tied else 0,
        hidden_size=arch.hidden_size,
        vocab_size=arch.vocab_size,
        max_context_tokens=arch.max_context_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBuilder:
    """From sizes to layers: the one place where activation, workspace, KV and attention costs are worked out."""

    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int

    def embedding(self, tensor_names: Collection[str], *, weight_bytes: int) -> Layer:
        return Layer(
            name="embedding",
            kind=LayerKind.EMBEDDING,
            tensor_names=tuple(tensor_names),
            weight_bytes=weight_bytes,
            kv_bytes_per_token=0,
            activation_bytes_per_token=self.hidden_size * self.dtype_bytes,
            workspace_bytes_per_token=2 * self.hidden_size * self.dtype_bytes,
            flops_per_token=0,
            attention_flops_per_context_token=0,
        )

    def decoder(
        self,
        index: int,
        tensor_names: Collection[str],
        *,
        weight_bytes: int,
        matrix_parameters: int,
        inner_size: int,
        window_tokens: int | None = None,
        experts: Experts | None = None,
        has_kv: bool = True,
    ) -> Layer:
        """``matrix_parameters`` are those that each token is multiplied with: of experts, those it passes through."""
        own_kv = kv_cache_bytes_per_token(
            num_layers=1, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, dtype_bytes=self.dtype_bytes
        )
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim  # queries, output, keys, values
        return Layer(
            name=f"decoder {index}",
            kind=LayerKind.DECODER,
            tensor_names=tuple(tensor_names),
            weight_bytes=weight_bytes,
            kv_bytes_per_token=own_kv if has_kv else 0,
            activation_bytes_per_token=self.hidden_size * self.dtype_bytes,
            workspace_bytes_per_token=(2 * self.hidden_size + max(attention, 3 * inner_size)) * self.dtype_bytes,
            flops_per_token=2 * matrix_parameters,
            attention_flops_per_context_token=4 * self.num_heads * self.head_dim,
            window_tokens=window_tokens,
            experts=experts,
        )

    def head(self, tensor_names: Collection[str], *, weight_bytes: int, matrix_parameters: int) -> Layer:
        logits = self.vocab_size * LOGITS_BYTES
        return Layer(
            name="head",
            kind=LayerKind.HEAD,
            tensor_names=tuple(tensor_names),
            weight_bytes=weight_bytes,
            kv_bytes_per_token=0,
            activation_bytes_per_token=logits,
            workspace_bytes_per_token=2 * self.hidden_size * self.dtype_bytes + 2 * logits,
            flops_per_token=2 * matrix_parameters,
            attention_flops_per_context_token=0,
        )


def _embedding(arch: Architecture, names: CheckpointNames, builder: LayerBuilder) -> Layer:
    shapes = dict([(names.embedding_table, arch.table_shape), *names.under("", arch.embedding)])
    return builder.embedding(shapes, weight_bytes=_parameters(shapes) * builder.dtype_bytes)


def _decoder(arch: Architecture, names: CheckpointNames, builder: LayerBuilder, index: int) -> Layer:
    decoder = arch.decoders[index]
    shapes = dict(names.under(arch.decoder_prefix.format(index), decoder.tensors))
    routed = {name: shape for name, shape in shapes.items() if decoder.num_experts and ".experts." in name}
    dense = {name: shape for name, shape in shapes.items() if name not in routed}
    each = _parameters(routed) // decoder.num_experts if decoder.num_experts else 0
    return builder.decoder(
        index,
        shapes,
        weight_bytes=_parameters(shapes) * builder.dtype_bytes,
        matrix_parameters=_matrix_parameters(dense) + decoder.active_experts * each,
        inner_size=decoder.inner_size,
        window_tokens=decoder.window_tokens,
        experts=Experts(count=decoder.num_experts, active=decoder.active_experts, bytes_each=each * builder.dtype_bytes)
        if routed
        else None,
        has_kv=decoder.kv_source is None,
    )


def _head(arch: Architecture, names: CheckpointNames, builder: LayerBuilder) -> Layer:
    shapes = dict([*names.under("", arch.head), (names.head_table, arch.table_shape)])
    return builder.head(
        shapes, weight_bytes=_parameters(shapes) * builder.dtype_bytes, matrix_parameters=_matrix_parameters(shapes)
    )


def _parameters(shapes: Mapping[str, Shape]) -> int:
    return sum(prod(shape) for shape in shapes.values())


def _matrix_parameters(shapes: Mapping[str, Shape]) -> int:
    return sum(prod(shape) for shape in shapes.values() if len(shape) == 2)


def _compute_dtype(config: Mapping[str, object], tensors: Mapping[str, TensorHeader]) -> str:
    """Return the dtype that config.json names, else that of the first tensor that is no mask or other buffer."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named is not None:
        return str(named).removeprefix("torch.")
    found = next((header.dtype for header in tensors.values() if header.dtype in STORED_DTYPES), "F32")
    return STORED_DTYPES[found]
