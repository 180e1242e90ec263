"""Replaces the elementwise parts of transformers' Llama modules by compiled ones: same values, far less overhead.

The modules stay transformers' own; what is replaced is how RMSNorm, the rotary embedding and SiLU(gate) * up are
computed, in float32 on the CPU, in Llama and in the families whose modules compute the same. Without a C compiler
nothing is replaced.
"""

import ctypes
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Whose norm, rotary embedding and MLP are Llama's, under names that begin with:
LIKE_LLAMA = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class LlamaOps:
    """The functions of ``kernels/llama_ops.c``."""

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))
        self._rms_norm = functions.flexpiped_rms_norm
        self._rms_norm.argtypes = (_POINTER, _INT, _POINTER, _POINTER, _INT, _INT, _INT, _FLOAT)
        self._rotary = functions.flexpiped_rotary
        self._rotary.argtypes = (_POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT)
        self._silu_mul = functions.flexpiped_silu_mul
        self._silu_mul.argtypes = (_POINTER, _POINTER, _INT)
        for function in (self._rms_norm, self._rotary, self._silu_mul):
            function.restype = None

    def rms_norm(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """What ``LlamaRMSNorm.forward`` computes."""
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        size = hidden.shape[-1]
        rows = hidden.numel() // size
        weight = module.weight
        self._rms_norm(
            hidden.data_ptr(), size, weight.data_ptr(), out.data_ptr(), size, rows, size, module.variance_epsilon
        )
        return out

    def rotary(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``apply_rotary_pos_emb`` computes, but in place: nobody else has q and k, (1, heads, tokens, dim)."""
        if unsqueeze_dim != 1 or q.shape[0] != 1:
            raise ValueError("only one batch of shape (1, heads, tokens, dim) is rotated here")
        cos, sin = cos.contiguous(), sin.contiguous()
        for x in (q, k):
            _, heads, tokens, dim = x.shape
            self._rotary(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), tokens, heads, dim, x.stride(2), x.stride(1))
        return q, k

    def gated_mlp(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """What ``LlamaMLP.forward`` computes with SiLU."""
        gate, up = module.gate_proj(hidden), module.up_proj(hidden)
        self._silu_mul(gate.data_ptr(), up.data_ptr(), gate.numel())
        down: torch.Tensor = module.down_proj(gate)
        return down


def install(model: nn.Module, library: Path) -> None:
    """Have a float32 model on the CPU use the compiled parts. Before the first fork, so that every worker has them.

    Nothing happens to a model whose family is not in ``LIKE_LLAMA``.
    """
    prefix = LIKE_LLAMA.get(model.config.model_type)  # type: ignore[union-attr, arg-type]
    if prefix is None:
        return
    ops = LlamaOps(library)
    modeling: Any = sys.modules[type(model).__module__]
    modeling.apply_rotary_pos_emb = ops.rotary
    module: Any
    for module in model.modules():
        match type(module).__name__.removeprefix(prefix):
            case "RMSNorm":
                module.forward = partial(ops.rms_norm, module)
            case "MLP" if module.config.hidden_act == "silu":
                module.forward = partial(ops.gated_mlp, module)
