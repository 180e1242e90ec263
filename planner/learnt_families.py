"""Families with learnt positions: GPT-2 and OPT. Names of keys, tensors and defaults are those of transformers."""

from planner.architecture import Architecture, Config, Decoder, Shape
from planner.errors import UnsupportedModel

_OPT_POSITIONS_BEFORE = 2  # rows of its position table that no token has


def gpt2(config: Config) -> Architecture:
    hidden = config.positive("n_embd", 768)
    heads = config.positive("n_head", 12)
    inner = config.positive("n_inner", 4 * hidden)
    context = config.positive("n_positions", 1024)
    tensors: dict[str, Shape] = {}
    for norm in ("ln_1", "ln_2"):
        tensors |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    for name, rows, columns in (  # GPT-2's Conv1D keeps weights as (in, out)
        ("attn.c_attn", hidden, 3 * hidden),
        ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", hidden, inner),
        ("mlp.c_proj", inner, hidden),
    ):
        tensors |= {f"{name}.weight": (rows, columns), f"{name}.bias": (columns,)}
    return Architecture(
        hidden_size=hidden,
        vocab_size=config.positive("vocab_size", 50257),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config.heads(hidden_size=hidden, num_heads=heads),
        max_context_tokens=context,
        ties_embeddings=config.flag("tie_word_embeddings", default=True),
        base_prefix="transformer.",
        decoder_prefix="h.{}.",
        embedding_table="wte.weight",
        head_table="lm_head.weight",
        embedding={"wpe.weight": (context, hidden)},
        decoders=(Decoder(tensors=tensors, inner_size=inner),) * config.positive("n_layer", 12),
        head={"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)},
        buffers=(".attn.bias", ".attn.masked_bias"),
    )


def opt(config: Config) -> Architecture:
    hidden = config.positive("hidden_size", 768)
    heads = config.positive("num_attention_heads", 12)
    inner = config.positive("ffn_dim", 3072)
    context = config.positive("max_position_embeddings", 2048)
    width = config.positive("word_embed_proj_dim", hidden)
    if not config.flag("layer_norm_elementwise_affine", default=True):
        raise UnsupportedModel("config.json: layer_norm_elementwise_affine false is not supported")
    biased = config.flag("enable_bias", default=True)
    tensors: dict[str, Shape] = {}
    for norm in ("self_attn_layer_norm", "final_layer_norm"):
        tensors |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    for name, inputs, outputs in (
        *((f"self_attn.{part}_proj", hidden, hidden) for part in ("q", "k", "v", "out")),
        ("fc1", hidden, inner),
        ("fc2", inner, hidden),
    ):
        tensors |= {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if biased else {})
    projected = width != hidden
    ends_normed = config.flag("do_layer_norm_before", default=True) and not config.flag(
        "_remove_final_layer_norm", default=False
    )
    norm_shapes: dict[str, Shape] = {f"decoder.final_layer_norm.{part}": (hidden,) for part in ("weight", "bias")}
    return Architecture(
        hidden_size=hidden,
        vocab_size=config.positive("vocab_size", 50272),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config.heads(hidden_size=hidden, num_heads=heads),
        max_context_tokens=context,
        ties_embeddings=config.flag("tie_word_embeddings", default=True),
        base_prefix="model.",
        decoder_prefix="decoder.layers.{}.",
        embedding_table="decoder.embed_tokens.weight",
        head_table="lm_head.weight",
        embedding={"decoder.embed_positions.weight": (context + _OPT_POSITIONS_BEFORE, hidden)}
        | ({"decoder.project_in.weight": (hidden, width)} if projected else {}),
        decoders=(Decoder(tensors=tensors, inner_size=inner),) * config.positive("num_hidden_layers", 12),
        head=(norm_shapes if ends_normed else {})
        | ({"decoder.project_out.weight": (width, hidden)} if projected else {}),
        buffers=(),
        table_width=width,
    )
