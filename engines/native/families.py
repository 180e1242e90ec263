"""The model families that the native engine runs, and how a model is built: its modules' shape, without memory."""

from typing import Any

import torch

from engines.errors import UnsupportedByEngine
from engines.native.family import Family
from engines.native.learnt_families import Gpt2Family, OptFamily
from engines.native.rotary_families import (
    Gemma2Family,
    Gemma3Family,
    GptNeoxFamily,
    MixtralFamily,
    MixtureFamily,
    RotaryFamily,
)

FAMILIES: dict[str, type[Family]] = {
    "gemma2": Gemma2Family,
    "gemma3_text": Gemma3Family,
    "gpt2": Gpt2Family,
    "gpt_neox": GptNeoxFamily,
    "llama": RotaryFamily,
    "mistral": RotaryFamily,
    "mixtral": MixtralFamily,
    "opt": OptFamily,
    "phi3": RotaryFamily,
    "qwen2": RotaryFamily,
    "qwen3": RotaryFamily,
    "qwen3_moe": MixtureFamily,
}


def build_family(config: Any, *, attention: str, max_model_len: int, dtype: torch.dtype) -> Family:
    """Build the model's modules on the meta device: their shape, no memory.

    Raises:
        UnsupportedByEngine: The family or a feature of it is not supported.
    """
    from transformers import AutoModelForCausalLM

    kind = FAMILIES.get(config.model_type)
    if kind is None:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedByEngine(f"model type {config.model_type!r} is not supported yet (supported: {known})")
    if getattr(config, "quantization_config", None):
        raise UnsupportedByEngine("quantised checkpoints are not supported yet")
    kind.check(config, max_model_len=max_model_len)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.eval().requires_grad_(requires_grad=False)
    model.config._attn_implementation = attention  # from_config takes only the names it knows
    return kind(model, max_model_len=max_model_len, dtype=dtype)
