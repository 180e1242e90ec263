"""Families with rotary positions, which differ in details only: Llama and those after it.

Names of keys, tensors and defaults are those of transformers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from planner.architecture import Architecture, Config, Decoder, Shape, kv_sources
from planner.errors import UnsupportedModel

_BUFFERS = ("rotary_emb.inv_freq",)
_MLP = ("gate", "up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    decoders: int


def llama(config: Config) -> Architecture:
    sizes = _sizes(config, hidden=4096, inner=11008, heads=32, decoders=32)
    tensors = _norms(sizes) | _attention(sizes) | _mlp("mlp", sizes.hidden, sizes.inner)
    if config.flag("attention_bias", default=False):
        tensors |= _biases(tensors, [f"self_attn.{name}_proj" for name in "qkvo"])
    if config.flag("mlp_bias", default=False):
        tensors |= _biases(tensors, [f"mlp.{name}_proj" for name in _MLP])
    return _model(config, sizes, _alike(sizes, tensors), vocab=32000, context=2048)


def mistral(config: Config) -> Architecture:
    sizes = _sizes(config, hidden=4096, inner=14336, heads=32, decoders=32, kv_heads=8)
    tensors = _norms(sizes) | _attention(sizes) | _mlp("mlp", sizes.hidden, sizes.inner)
    windows = _windows(config, sizes.decoders, config.optional("sliding_window", 4096), lambda _index: True)
    return _model(config, sizes, _windowed(_alike(sizes, tensors), windows), vocab=32000, context=4096 * 32)


def qwen2(config: Config) -> Architecture:
    sizes = _sizes(config, hidden=4096, inner=22016, heads=32, decoders=32, kv_heads=32)
    tensors = _norms(sizes) | _attention(sizes) | _mlp("mlp", sizes.hidden, sizes.inner)
    tensors |= _biases(tensors, [f"self_attn.{name}_proj" for name in "qkv"])
    decoders = _windowed(_alike(sizes, tensors), _qwen_windows(config, sizes.decoders))
    return _model(config, sizes, decoders, vocab=151936, context=32768)


def qwen3(config: Config) -> Architecture:
    sizes = _sizes(config, hidden=4096, inner=22016, heads=32, decoders=32, kv_heads=32, head_dim=128)
    tensors = _normed_attention(config, sizes) | _mlp("mlp", sizes.hidden, sizes.inner)
    decoders = _windowed(_alike(sizes, tensors), _qwen_windows(config, sizes.decoders))
    return _model(config, sizes, decoders, vocab=151936, context=32768)


def qwen3_moe(config: Config) -> Architecture:
    """Mixtures in every ``decoder_sparse_step``-th decoder but those of ``mlp_only_layers``."""
    sizes = _sizes(config, hidden=2048, inner=6144, heads=32, decoders=24, kv_heads=4)
    attention = _normed_attention(config, sizes)
    inner = config.positive("moe_intermediate_size", 768)
    count = config.positive("num_experts", config.positive("num_local_experts", 128))  # transformers 5 saves the latter
    active = config.positive("num_experts_per_tok", 8)
    _check_experts(count, active)
    step, dense_only = config.positive("decoder_sparse_step", 1), config.indices("mlp_only_layers")
    routed: dict[str, Shape] = {"mlp.gate.weight": (count, sizes.hidden)}
    for expert in range(count):
        routed |= _mlp(f"mlp.experts.{expert}", sizes.hidden, inner)
    mixture = Decoder(tensors=attention | routed, inner_size=active * inner, num_experts=count, active_experts=active)
    dense = Decoder(tensors=attention | _mlp("mlp", sizes.hidden, sizes.inner), inner_size=sizes.inner)
    decoders = tuple(
        mixture if index not in dense_only and (index + 1) % step == 0 else dense for index in range(sizes.decoders)
    )
    windowed = _windowed(decoders, _qwen_windows(config, sizes.decoders))
    return _model(config, sizes, windowed, vocab=151936, context=32768)


def mixtral(config: Config) -> Architecture:
    sizes = _sizes(config, hidden=4096, inner=14336, heads=32, decoders=32, kv_heads=8)
    count, active = config.positive("num_local_experts", 8), config.positive("num_experts_per_tok", 2)
    _check_experts(count, active)
    tensors = _norms(sizes) | _attention(sizes) | {"block_sparse_moe.gate.weight": (count, sizes.hidden)}
    for expert in range(count):
        under = f"block_sparse_moe.experts.{expert}"
        tensors |= _linear(f"{under}.w1", sizes.hidden, sizes.inner) | _linear(f"{under}.w3", sizes.hidden, sizes.inner)
        tensors |= _linear(f"{under}.w2", sizes.inner, sizes.hidden)
    mixture = Decoder(tensors=tensors, inner_size=active * sizes.inner, num_experts=count, active_experts=active)
    windows = _windows(config, sizes.decoders, config.optional("sliding_window", None), lambda _index: True)
    return _model(config, sizes, _windowed((mixture,) * sizes.decoders, windows), vocab=32000, context=4096 * 32)


def gemma2(config: Config) -> Architecture:
    """Windows in every other decoder, beginning with the first."""
    sizes = _sizes(config, hidden=2304, inner=9216, heads=8, decoders=26, kv_heads=4, head_dim=256)
    norms: dict[str, Shape] = {f"{name}_feedforward_layernorm.weight": (sizes.hidden,) for name in ("pre", "post")}
    tensors = _norms(sizes) | norms | _attention(sizes) | _mlp("mlp", sizes.hidden, sizes.inner)
    if config.flag("attention_bias", default=False):
        tensors |= _biases(tensors, [f"self_attn.{name}_proj" for name in "qkvo"])
    windows = _windows(config, sizes.decoders, config.optional("sliding_window", 4096), lambda index: index % 2 == 0)
    decoders = _windowed(_alike(sizes, tensors), windows)
    return _model(config, sizes, decoders, vocab=256000, context=8192, tied=True)


def gemma3(config: Config) -> Architecture:
    """Windows in all decoders but every ``sliding_window_pattern``-th."""
    sizes = _sizes(config, hidden=2304, inner=9216, heads=8, decoders=26, kv_heads=4, head_dim=256)
    norms: dict[str, Shape] = {f"{name}_feedforward_layernorm.weight": (sizes.hidden,) for name in ("pre", "post")}
    tensors = _normed_attention(config, sizes) | norms | _mlp("mlp", sizes.hidden, sizes.inner)
    pattern = config.positive("sliding_window_pattern", 6)
    window = config.optional("sliding_window", 4096)
    windows = _windows(config, sizes.decoders, window, lambda index: (index + 1) % pattern != 0)
    decoders = _windowed(_alike(sizes, tensors), windows)
    return _model(config, sizes, decoders, vocab=262208, context=131072, tied=True)


def gpt_neox(config: Config) -> Architecture:
    """Queries, keys and values in one matrix; biases everywhere, though in attention they may be left out."""
    sizes = _sizes(config, hidden=6144, inner=24576, heads=64, decoders=44)
    tensors: dict[str, Shape] = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors |= {f"{norm}.weight": (sizes.hidden,), f"{norm}.bias": (sizes.hidden,)}
    tensors |= _linear("attention.query_key_value", sizes.hidden, 3 * sizes.hidden)
    tensors |= _linear("attention.dense", sizes.hidden, sizes.hidden)
    biased = ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    if config.flag("attention_bias", default=True):
        biased += ["attention.query_key_value", "attention.dense"]
    tensors |= _linear("mlp.dense_h_to_4h", sizes.hidden, sizes.inner)
    tensors |= _linear("mlp.dense_4h_to_h", sizes.inner, sizes.hidden)
    decoders = _alike(sizes, tensors | _biases(tensors, biased))
    return replace(
        _model(config, sizes, decoders, vocab=50432, context=2048),
        base_prefix="gpt_neox.",
        embedding_table="embed_in.weight",
        head_table="embed_out.weight",
        head={f"final_layer_norm.{part}": (sizes.hidden,) for part in ("weight", "bias")},
        buffers=(*_BUFFERS, ".attention.bias", ".attention.masked_bias"),
    )


def phi3(config: Config) -> Architecture:
    sizes = _sizes(config, hidden=3072, inner=8192, heads=32, decoders=32)
    tensors = _norms(sizes) | _linear("self_attn.o_proj", sizes.heads * sizes.head_dim, sizes.hidden)
    tensors |= _linear("self_attn.qkv_proj", sizes.hidden, (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim)
    tensors |= _linear("mlp.gate_up_proj", sizes.hidden, 2 * sizes.inner)
    tensors |= _linear("mlp.down_proj", sizes.inner, sizes.hidden)
    windows = _windows(config, sizes.decoders, config.optional("sliding_window", None), lambda _index: True)
    return _model(config, sizes, _windowed(_alike(sizes, tensors), windows), vocab=32064, context=4096)


def _sizes(
    config: Config, *, hidden: int, inner: int, heads: int, decoders: int, kv_heads: int = 0, head_dim: int = 0
) -> _Sizes:
    """Read what all these families call alike; the arguments are one family's defaults, 0 for those that follow."""
    hidden = config.positive("hidden_size", hidden)
    heads = config.positive("num_attention_heads", heads)
    if not head_dim and config.values.get("head_dim") is None:
        head_dim = config.heads(hidden_size=hidden, num_heads=heads)
    kv_heads = config.positive("num_key_value_heads", kv_heads or heads)
    if heads % kv_heads:
        raise UnsupportedModel(f"config.json: {kv_heads} key-value heads do not divide {heads} attention heads")
    return _Sizes(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.positive("head_dim", head_dim),
        inner=config.positive("intermediate_size", inner),
        decoders=config.positive("num_hidden_layers", decoders),
    )


def _model(
    config: Config, sizes: _Sizes, decoders: tuple[Decoder, ...], *, vocab: int, context: int, tied: bool = False
) -> Architecture:
    sources = kv_sources(config, sizes.decoders)
    if any(source is not None for source in sources):
        decoders = tuple(replace(decoder, kv_source=source) for decoder, source in zip(decoders, sources, strict=True))
    return Architecture(
        hidden_size=sizes.hidden,
        vocab_size=config.positive("vocab_size", vocab),
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_context_tokens=config.positive("max_position_embeddings", context),
        ties_embeddings=config.flag("tie_word_embeddings", default=tied),
        base_prefix="model.",
        decoder_prefix="layers.{}.",
        embedding_table="embed_tokens.weight",
        head_table="lm_head.weight",
        embedding={},
        decoders=decoders,
        head={"norm.weight": (sizes.hidden,)},
        buffers=_BUFFERS,
    )


def _alike(sizes: _Sizes, tensors: dict[str, Shape]) -> tuple[Decoder, ...]:
    return (Decoder(tensors=tensors, inner_size=sizes.inner),) * sizes.decoders


def _windowed(decoders: Sequence[Decoder], windows: Sequence[int | None]) -> tuple[Decoder, ...]:
    return tuple(
        decoder if window is None else replace(decoder, window_tokens=window)
        for decoder, window in zip(decoders, windows, strict=True)
    )


def _windows(
    config: Config, count: int, window: int | None, has_window: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """Return each decoder's window: where the config's layer_types say so, else where the family's rule does."""
    types = config.layer_types(count)
    if types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    return tuple(window if has_window(index) else None for index in range(count))


def _qwen_windows(config: Config, count: int) -> tuple[int | None, ...]:
    window = config.optional("sliding_window", 4096) if config.flag("use_sliding_window", default=False) else None
    first = config.optional("max_window_layers", 28) or 0
    return _windows(config, count, window, lambda index: index >= first)


def _normed_attention(config: Config, sizes: _Sizes) -> dict[str, Shape]:
    norms: dict[str, Shape] = {f"self_attn.{name}_norm.weight": (sizes.head_dim,) for name in "qk"}
    tensors = _norms(sizes) | _attention(sizes) | norms
    if config.flag("attention_bias", default=False):
        tensors |= _biases(tensors, [f"self_attn.{name}_proj" for name in "qkvo"])
    return tensors


def _norms(sizes: _Sizes) -> dict[str, Shape]:
    return {f"{name}_layernorm.weight": (sizes.hidden,) for name in ("input", "post_attention")}


def _attention(sizes: _Sizes) -> dict[str, Shape]:
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    tensors = _linear("self_attn.q_proj", sizes.hidden, queries) | _linear("self_attn.k_proj", sizes.hidden, keys)
    return (
        tensors | _linear("self_attn.v_proj", sizes.hidden, keys) | _linear("self_attn.o_proj", queries, sizes.hidden)
    )


def _mlp(under: str, hidden: int, inner: int) -> dict[str, Shape]:
    tensors = _linear(f"{under}.gate_proj", hidden, inner) | _linear(f"{under}.up_proj", hidden, inner)
    return tensors | _linear(f"{under}.down_proj", inner, hidden)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs)}


def _biases(tensors: dict[str, Shape], names: Sequence[str]) -> dict[str, Shape]:
    return {f"{name}.bias": tensors[f"{name}.weight"][:1] for name in names}


def _check_experts(count: int, active: int) -> None:
    if active > count:
        raise UnsupportedModel(f"config.json: a token cannot pass through {active} of {count} experts")
