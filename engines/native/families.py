"""Model families: how to drive transformers' own modules layer by layer.

A family knows where its embedding, decoders and head lie in the model's module tree; everything else is common.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from engines.errors import UnsupportedByEngine

_ROPE_TYPES = ("default", "linear", "llama3")


class Family(ABC):
    """One model on the meta device, taken apart into layers named ``embedding``, ``0``, ``1``, ... and ``head``."""

    def __init__(self, model: Any, *, max_model_len: int, dtype: torch.dtype) -> None:
        self.model = model
        self.config = model.config
        self.dtype = dtype
        self.max_model_len = max_model_len

    @staticmethod
    @abstractmethod
    def check(config: Any) -> None:
        """Refuse what the family cannot do exactly.

        Raises:
            UnsupportedByEngine: Names the feature.
        """

    @property
    @abstractmethod
    def num_kv_heads(self) -> int: ...

    @property
    @abstractmethod
    def head_dim(self) -> int: ...

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def num_decoders(self) -> int:
        return int(self.config.num_hidden_layers)

    @abstractmethod
    def modules(self, layer: str) -> dict[str, nn.Module]:
        """Return the modules of a layer by their full name in the model."""

    @abstractmethod
    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return hidden states (1, tokens, hidden) of token ids (1, tokens) at ``positions`` (tokens)."""

    @abstractmethod
    def step_arguments(self, positions: torch.Tensor) -> dict[str, Any]:
        """Return what every decoder is given beside the hidden states."""

    @abstractmethod
    def decoder(self, index: int) -> nn.Module: ...

    @abstractmethod
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (rows, vocabulary) of hidden states (rows, hidden)."""


class LlamaFamily(Family):
    """Rotary positions; each stage derives them from the tokens' positions."""

    def __init__(self, model: Any, *, max_model_len: int, dtype: torch.dtype) -> None:
        super().__init__(model, max_model_len=max_model_len, dtype=dtype)
        rotary = type(model.model.rotary_emb)(model.config)  # on the CPU: its buffers are computed, not loaded
        positions = torch.arange(max_model_len)[None]
        self._cos, self._sin = (t[0] for t in rotary(torch.empty(0, dtype=dtype), positions))

    @staticmethod
    def check(config: Any) -> None:
        rope = (config.rope_parameters or {}).get("rope_type", "default")
        if rope not in _ROPE_TYPES:
            raise UnsupportedByEngine(f"rope type {rope!r} is not supported yet (supported: {', '.join(_ROPE_TYPES)})")
        if getattr(config, "pretraining_tp", 1) != 1:
            raise UnsupportedByEngine("pretraining_tp other than 1 is not supported")

    @property
    def num_kv_heads(self) -> int:
        return int(self.config.num_key_value_heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.hidden_size // self.config.num_attention_heads)

    def modules(self, layer: str) -> dict[str, nn.Module]:
        inner = self.model.model
        if layer == "embedding":
            return {"model.embed_tokens": inner.embed_tokens}
        if layer == "head":
            return {"model.norm": inner.norm, "lm_head": self.model.lm_head}
        return {f"model.layers.{layer}": inner.layers[int(layer)]}

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        hidden: torch.Tensor = self.model.model.embed_tokens(tokens)
        return hidden

    def step_arguments(self, positions: torch.Tensor) -> dict[str, Any]:
        return {"position_embeddings": (self._cos[positions][None], self._sin[positions][None])}

    def decoder(self, index: int) -> nn.Module:
        layer: nn.Module = self.model.model.layers[index]
        return layer

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits.float()


class Gpt2Family(Family):
    """Learnt positions, added to the token embedding: only the first stage sees them."""

    @staticmethod
    def check(config: Any) -> None:
        if config.add_cross_attention:
            raise UnsupportedByEngine("GPT-2 with cross-attention is not supported")
        if config.reorder_and_upcast_attn:
            raise UnsupportedByEngine("reorder_and_upcast_attn is not supported")

    @property
    def num_kv_heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_kv_heads

    def modules(self, layer: str) -> dict[str, nn.Module]:
        inner = self.model.transformer
        if layer == "embedding":
            return {"transformer.wte": inner.wte, "transformer.wpe": inner.wpe}
        if layer == "head":
            return {"transformer.ln_f": inner.ln_f, "lm_head": self.model.lm_head}
        return {f"transformer.h.{layer}": inner.h[int(layer)]}

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        inner = self.model.transformer
        hidden: torch.Tensor = inner.wte(tokens) + inner.wpe(positions[None])
        return hidden

    def step_arguments(self, positions: torch.Tensor) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def decoder(self, index: int) -> nn.Module:
        layer: nn.Module = self.model.transformer.h[index]
        return layer

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.lm_head(self.model.transformer.ln_f(hidden))
        return logits.float()


FAMILIES: dict[str, type[Family]] = {"llama": LlamaFamily, "gpt2": Gpt2Family}
EMBEDDING_OF_HEAD = {"lm_head.weight": {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}}


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
    kind.check(config)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.eval().requires_grad_(requires_grad=False)
    model.config._attn_implementation = attention  # from_config takes only the names it knows
    return kind(model, max_model_len=max_model_len, dtype=dtype)
