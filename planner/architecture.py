"""What a model consists of, family apart: sizes, and the tensors of each layer; and the reading of a config.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.errors import UnsupportedModel

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """One decoder layer. ``tensors`` are named below its prefix; those of routed experts have ``.experts.`` in them."""

    tensors: Mapping[str, Shape]
    inner_size: int  # widest of the MLP, of all experts that a token passes through together
    window_tokens: int | None = None  # a token attends to so many, itself included
    kv_source: int | None = None  # the decoder whose KV cache this one reads; None: it has its own
    num_experts: int = 0
    active_experts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes of a model and the tensors of each layer, by name in the checkpoint and shape.

    Names carry no ``base_prefix``: older checkpoints were saved without it. ``head`` is the final norm, and what else
    comes before the LM head's own ``head_table``; ``embedding_table`` is used in its place where the two are tied.
    """

    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    ties_embeddings: bool
    base_prefix: str
    decoder_prefix: str  # has the decoder's number for {}
    embedding_table: str
    head_table: str
    embedding: Mapping[str, Shape]  # beside the table
    decoders: tuple[Decoder, ...]
    head: Mapping[str, Shape]
    buffers: tuple[str, ...]  # endings of tensors that older versions saved and nobody reads
    table_width: int = 0  # of the embedding table where it differs from the hidden size

    @property
    def num_decoders(self) -> int:
        return len(self.decoders)

    @property
    def table_shape(self) -> Shape:
        return self.vocab_size, self.table_width or self.hidden_size


class Config:
    """Typed reading of a config.json; what it refuses, it names."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self.values = values

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UnsupportedModel(f"config.json: {key} must be a positive whole number, not {value!r}")
        return value

    def optional(self, key: str, default: int | None) -> int | None:
        """Return a positive number; None where the config says null, ``default`` where it says nothing."""
        if key in self.values and self.values[key] is None:
            return None
        return default if default is None and key not in self.values else self.positive(key, default)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UnsupportedModel(f"config.json: {key} must be true or false, not {value!r}")
        return value

    def indices(self, key: str) -> frozenset[int]:
        """Return a list of layer numbers, empty by default."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(each, int) for each in value):
            raise UnsupportedModel(f"config.json: {key} must be a list of layer numbers, not {value!r}")
        return frozenset(value)

    def layer_types(self, count: int) -> tuple[str, ...] | None:
        """Return what the config calls the attention of each decoder, or None."""
        value = self.values.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            raise UnsupportedModel(f"config.json: layer_types must name the attention of each of {count} decoders")
        return tuple(map(str, value))

    def heads(self, *, hidden_size: int, num_heads: int) -> int:
        """Return the default size of a head, ``hidden_size / num_heads``."""
        if hidden_size % num_heads:
            raise UnsupportedModel(f"config.json: {num_heads} attention heads do not divide hidden size {hidden_size}")
        return hidden_size // num_heads


def kv_sources(config: Config, num_decoders: int) -> tuple[int | None, ...]:
    """Return for each decoder the one whose KV cache it reads, as configs say it; None where it has its own.

    ``num_kv_shared_layers``: so many at the end read that of the last decoder before them with the same kind of
    attention (Gemma 3n). ``cla_share_factor``: groups of so many read that of their first (Hunyuan-Large).
    """
    sources: list[int | None] = [None] * num_decoders
    if config.flag("use_cla", default=False):
        factor = config.positive("cla_share_factor", 2)
        return tuple(index - index % factor if index % factor else None for index in range(num_decoders))
    if config.values.get("num_kv_shared_layers"):
        first = num_decoders - config.positive("num_kv_shared_layers")
        types = config.layer_types(num_decoders) or ("full_attention",) * num_decoders
        for index in range(max(1, first), num_decoders):
            alike = [before for before in range(first) if types[before] == types[index]]
            sources[index] = alike[-1] if alike else max(0, first - 1)
    return tuple(sources)


def legal_cuts(sources: Sequence[int | None]) -> tuple[int, ...]:
    """Return the cuts that separate no decoder from the one whose KV cache it reads."""
    forbidden = {
        cut for index, source in enumerate(sources) if source is not None for cut in range(source + 1, index + 1)
    }
    return tuple(cut for cut in range(1, len(sources)) if cut not in forbidden)
