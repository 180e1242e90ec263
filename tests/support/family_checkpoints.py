"""Tiny random checkpoints of every family that the native engine runs, each with what is special about the family.

Norms and biases are noise too, so that one left out, swapped or added to the wrong place shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.support.checkpoints import BOS, EOS, SPECIAL_TOKENS, causal_model, make

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flexpiped" / "test-models"
NUM_DECODERS: Final = 4
WINDOW: Final = 20  # tokens: shorter than the tests' prompts
ROPE: Final = {"rope_type": "default", "rope_theta": 1e4}
_SIZES: Final[dict[str, Any]] = {
    "num_hidden_layers": NUM_DECODERS,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": SPECIAL_TOKENS.index(BOS),
    "eos_token_id": SPECIAL_TOKENS.index(EOS),
    "pad_token_id": SPECIAL_TOKENS.index(EOS),
    "dtype": "float32",
}
_GATED: Final = {"num_key_value_heads": 2, "intermediate_size": 64, "initializer_range": 0.3}


def _gemma2() -> PretrainedConfig:
    from transformers import Gemma2Config

    return _config(
        Gemma2Config,
        head_dim=16,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
        tie_word_embeddings=True,
    )


def _gemma3() -> PretrainedConfig:
    from transformers import Gemma3TextConfig

    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    }
    return _config(
        Gemma3TextConfig,
        head_dim=16,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        sliding_window_pattern=3,
        rope_parameters=ropes,
        tie_word_embeddings=True,
    )


def _gpt2() -> PretrainedConfig:
    from transformers import GPT2Config

    return _config(GPT2Config, gated=False, initializer_range=0.3, tie_word_embeddings=True)


def _gpt_neox() -> PretrainedConfig:
    from transformers import GPTNeoXConfig

    rope = {**ROPE, "partial_rotary_factor": 0.5}
    return _config(GPTNeoXConfig, gated=False, intermediate_size=64, initializer_range=0.3, rope_parameters=rope)


def _gpt_neox_serial() -> PretrainedConfig:
    config: Any = _gpt_neox()
    config.use_parallel_residual = False
    config.attention_bias = False
    return config  # type: ignore[no-any-return]


def _llama() -> PretrainedConfig:
    from transformers import LlamaConfig

    return _config(LlamaConfig, attention_bias=True, mlp_bias=True)


def _mistral() -> PretrainedConfig:
    from transformers import MistralConfig

    return _config(MistralConfig, sliding_window=WINDOW)


def _mixtral() -> PretrainedConfig:
    from transformers import MixtralConfig

    return _config(MixtralConfig, num_local_experts=4, num_experts_per_tok=2)


def _opt() -> PretrainedConfig:
    from transformers import OPTConfig

    return _config(OPTConfig, gated=False, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3, tie_word_embeddings=True)


def _opt_projected() -> PretrainedConfig:
    """As the one of 350 M parameters: a narrower table, and norms after attention and MLP."""
    config: Any = _opt()
    config.word_embed_proj_dim = 16
    config.init_std = 1.0  # what is normed last varies less
    config.do_layer_norm_before = False
    return config  # type: ignore[no-any-return]


def _phi3() -> PretrainedConfig:
    from transformers import Phi3Config

    rope = {
        **ROPE,
        "rope_type": "longrope",
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5],
        "long_factor": [4.0, 9.0],
    }
    return _config(
        Phi3Config,
        sliding_window=WINDOW,
        auto_map={"AutoConfig": "no_such_code.Config", "AutoModelForCausalLM": "no_such_code.Model"},  # never to be run
        rope_parameters=rope,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
    )


def _qwen2() -> PretrainedConfig:
    from transformers import Qwen2Config

    return _config(
        Qwen2Config, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2, tie_word_embeddings=True
    )


def _qwen3() -> PretrainedConfig:
    from transformers import Qwen3Config

    yarn = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    return _config(Qwen3Config, head_dim=16, rope_parameters=yarn)


def _qwen3_moe() -> PretrainedConfig:
    from transformers import Qwen3MoeConfig

    return _config(
        Qwen3MoeConfig,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )


_KINDS: Final[dict[str, Callable[[], PretrainedConfig]]] = {
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gpt_neox-serial": _gpt_neox_serial,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "opt": _opt,
    "opt-projected": _opt_projected,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}
KINDS: Final = tuple(_KINDS)  # a model type, or one with a variant of it
VARIANTS: Final = tuple(kind for kind in KINDS if "-" in kind)
MAX_MODEL_LEN: Final = 128  # of all of them: so long, Phi-3 is not scaled


def config_of(kind: str) -> PretrainedConfig:
    """Return the configuration of a kind of ``KINDS``."""
    return _KINDS[kind]()


def make_family(kind: str, *, root: Path = CACHE / "families", shards: int = 1, dtype: str = "float32") -> Path:
    """Make the checkpoint of a kind below ``root`` unless it is there, and return its directory."""
    config = config_of(kind)
    config.dtype = dtype
    return make(root / f"{kind}-{dtype}-{shards}", config, model_of=noisy_model, shards=shards)


def make_gemma3_that_sees_images(*, root: Path = CACHE / "families") -> Path:
    """Make Gemma 3 as it is published from 4 B on, its text part that of ``config_of("gemma3_text")``."""
    from transformers import Gemma3Config

    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = Gemma3Config(
        text_config=config_of("gemma3_text").to_dict(),
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        tie_word_embeddings=True,
        dtype="float32",
    )
    return make(root / "gemma3-float32", config, model_of=_noisy_image_model)


def _noisy_image_model(config: PretrainedConfig) -> PreTrainedModel:
    from transformers import Gemma3ForConditionalGeneration

    return _noisy(Gemma3ForConditionalGeneration(config))


def noisy_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the language model that ``config`` describes, with noise in its norms and biases.

    Where the head is the embedding's table, a small table has the decoders say what comes next, not the last token.
    """
    return _noisy(causal_model(config))


def _noisy(model: PreTrainedModel) -> PreTrainedModel:
    import torch

    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    if model.config.tie_word_embeddings:
        model.get_input_embeddings().weight.data *= 0.1
    return model


def _config(kind: Callable[..., PretrainedConfig], *, gated: bool = True, **special: Any) -> PretrainedConfig:
    return kind(**(_SIZES | (_GATED if gated else {}) | special))
