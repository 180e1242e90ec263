"""The model families that can be served: what their config.json means and which tensors their checkpoints hold.

A family is one function from config to ``Architecture`` and one line in ``FAMILIES``. Names of keys and tensors are
those of transformers; a config may leave a key out, then transformers' default holds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from planner.errors import UnsupportedModel

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes of a model and the tensors of each layer, by name in the checkpoint and shape.

    Names carry no ``base_prefix`` where ``optional_prefix`` says that older checkpoints were saved without it.
    ``decoder`` holds the tensors of any one decoder, below ``decoder_prefix``. ``head`` is the final norm only; the LM
    head's own table is ``head_table``, and ``embedding_table`` is used in its place where the two are tied.
    """

    num_decoders: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_context_tokens: int
    ties_embeddings: bool
    base_prefix: str
    decoder_prefix: str  # has the decoder's number for {}
    embedding_table: str
    head_table: str
    embedding: Mapping[str, Shape]  # beside the table
    decoder: Mapping[str, Shape]
    head: Mapping[str, Shape]
    buffers: tuple[str, ...]  # endings of tensors that older versions saved and nobody reads


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

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UnsupportedModel(f"config.json: {key} must be true or false, not {value!r}")
        return value

    def heads(self, *, hidden_size: int, num_heads: int) -> int:
        """Return the default size of a head, ``hidden_size / num_heads``."""
        if hidden_size % num_heads:
            raise UnsupportedModel(f"config.json: {num_heads} attention heads do not divide hidden size {hidden_size}")
        return hidden_size // num_heads


def read_architecture(values: Mapping[str, object]) -> Architecture:
    """Return what a parsed config.json describes.

    Raises:
        UnsupportedModel: Another family, a feature that is not supported, or a value that cannot be.
    """
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        named = f"model_type {model_type!r}" if model_type else "a config.json without model_type"
        raise UnsupportedModel(f"{named} is not supported; supported are: {', '.join(sorted(FAMILIES))}")
    architectures = values.get("architectures")
    family = FAMILIES[str(model_type)]
    if isinstance(architectures, list) and architectures and not family.classes.intersection(map(str, architectures)):
        raise UnsupportedModel(
            f"architecture {architectures[0]} is not a causal language model; "
            f"of {model_type}, supported are: {', '.join(sorted(family.classes))}"
        )
    for key, feature in UNSUPPORTED_FEATURES.items():
        if values.get(key):
            raise UnsupportedModel(f"config.json: {key}: {feature} not supported")
    return family.read(Config(values))


def _llama(config: Config) -> Architecture:
    hidden = config.positive("hidden_size", 4096)
    heads = config.positive("num_attention_heads", 32)
    kv_heads = config.positive("num_key_value_heads", heads)
    head_dim = config.positive("head_dim", config.heads(hidden_size=hidden, num_heads=heads))
    inner = config.positive("intermediate_size", 11008)
    if heads % kv_heads:
        raise UnsupportedModel(f"config.json: {kv_heads} key-value heads do not divide {heads} attention heads")
    decoder: dict[str, Shape] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    decoder |= _linear("self_attn.q_proj", hidden, heads * head_dim)
    decoder |= _linear("self_attn.k_proj", hidden, kv_heads * head_dim)
    decoder |= _linear("self_attn.v_proj", hidden, kv_heads * head_dim)
    decoder |= _linear("self_attn.o_proj", heads * head_dim, hidden)
    decoder |= _linear("mlp.gate_proj", hidden, inner)
    decoder |= _linear("mlp.up_proj", hidden, inner)
    decoder |= _linear("mlp.down_proj", inner, hidden)
    if config.flag("attention_bias", default=False):
        decoder |= {f"self_attn.{name}_proj.bias": decoder[f"self_attn.{name}_proj.weight"][:1] for name in "qkvo"}
    if config.flag("mlp_bias", default=False):
        decoder |= {f"mlp.{name}_proj.bias": decoder[f"mlp.{name}_proj.weight"][:1] for name in ("gate", "up", "down")}
    return Architecture(
        num_decoders=config.positive("num_hidden_layers", 32),
        hidden_size=hidden,
        vocab_size=config.positive("vocab_size", 32000),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        max_context_tokens=config.positive("max_position_embeddings", 2048),
        ties_embeddings=config.flag("tie_word_embeddings", default=False),
        base_prefix="model.",
        decoder_prefix="layers.{}.",
        embedding_table="embed_tokens.weight",
        head_table="lm_head.weight",
        embedding={},
        decoder=decoder,
        head={"norm.weight": (hidden,)},
        buffers=("rotary_emb.inv_freq",),
    )


def _gpt2(config: Config) -> Architecture:
    hidden = config.positive("n_embd", 768)
    heads = config.positive("n_head", 12)
    inner = config.positive("n_inner", 4 * hidden)
    context = config.positive("n_positions", 1024)
    decoder: dict[str, Shape] = {}
    for norm in ("ln_1", "ln_2"):
        decoder |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    for name, rows, columns in (  # GPT-2's Conv1D keeps weights as (in, out)
        ("attn.c_attn", hidden, 3 * hidden),
        ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", hidden, inner),
        ("mlp.c_proj", inner, hidden),
    ):
        decoder |= {f"{name}.weight": (rows, columns), f"{name}.bias": (columns,)}
    return Architecture(
        num_decoders=config.positive("n_layer", 12),
        hidden_size=hidden,
        vocab_size=config.positive("vocab_size", 50257),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config.heads(hidden_size=hidden, num_heads=heads),
        intermediate_size=inner,
        max_context_tokens=context,
        ties_embeddings=config.flag("tie_word_embeddings", default=True),
        base_prefix="transformer.",
        decoder_prefix="h.{}.",
        embedding_table="wte.weight",
        head_table="lm_head.weight",
        embedding={"wpe.weight": (context, hidden)},
        decoder=decoder,
        head={"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)},
        buffers=(".attn.bias", ".attn.masked_bias"),
    )


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to read a family's config.json, and the classes of transformers that its checkpoints may name."""

    read: Callable[[Config], Architecture]
    classes: frozenset[str]


FAMILIES: dict[str, Family] = {
    "gpt2": Family(read=_gpt2, classes=frozenset({"GPT2LMHeadModel", "GPT2Model"})),
    "llama": Family(read=_llama, classes=frozenset({"LlamaForCausalLM", "LlamaModel"})),
}

UNSUPPORTED_FEATURES = {  # keys of config.json that must be absent, null or false
    "quantization_config": "quantised weights are",
    "is_encoder_decoder": "an encoder is",
    "add_cross_attention": "cross-attention is",
}
