"""Whole decoders in one call of ``kernels/decoder.c``, for the families whose decoders are Llama's.

In float32 on the CPU. A decoder is described once, when its weights are attached, in C's words; a step then costs one
call per decoder. What is not exactly Llama's goes through transformers' modules.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engines.native.attention import fits_kernel, native_step
from engines.native.linear import LinearStruct, struct_of
from engines.native.paged_step import PagedStep

if TYPE_CHECKING:
    from engines.native.family import Family

_DECODERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Decoder(ctypes.Structure):
    _fields_ = (
        *((name, LinearStruct) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, _FLOAT) for name in ("norm_epsilon", "scale")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "window")),
    )


class _Seconds(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_double) for name in ("products", "attention", "elementwise"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeSeconds:
    """What the time in decoders went to: matrix products, attention, and norms, rotation and activations."""

    products_s: float = 0.0
    attention_s: float = 0.0
    elementwise_s: float = 0.0


def is_like_llama(family: "Family", *, kv_block_tokens: int) -> bool:
    """Say whether all decoders of the family compute what ``kernels/decoder.c`` does."""
    config = family.config
    positions = torch.zeros(1).long()
    heads = int(config.num_attention_heads)
    return (
        all(type(family.decoder(i)).__name__ in _DECODERS for i in range(family.num_decoders))
        and config.hidden_act == "silu"
        and fits_kernel(family.head_dim, heads, family.num_kv_heads, kv_block_tokens)
        # else only a part of each head is rotated
        and family.step_arguments(positions)[0]["position_embeddings"][0].shape[-1] == family.head_dim
    )


class CompiledDecoders:
    """The decoders that a worker holds, as C sees them."""

    def __init__(self, library: Path, family: "Family") -> None:
        functions = ctypes.CDLL(str(library))
        self._family = family
        self._run = functions.flexpiped_decoder
        self._run.argtypes = (_POINTER,) * 9
        self._scratch_floats = functions.flexpiped_decoder_scratch
        self._scratch_floats.argtypes, self._scratch_floats.restype = (_POINTER, _INT), _INT
        self._held: dict[int, _Decoder] = {}
        self._scratch = torch.empty(0)
        self._seconds = _Seconds()

    def attach(self, index: int) -> None:
        """Describe a decoder whose weights have been attached. They stay where they are."""
        decoder: Any = self._family.decoder(index)
        attention, mlp = decoder.self_attn, decoder.mlp
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        window = getattr(attention, "sliding_window", None)
        if type(decoder).__name__ == "MistralDecoderLayer":
            window = self._family.config.sliding_window
        self._held[index] = _Decoder(
            *(_linear(getattr(attention, f"{name}_proj")) for name in ("q", "k", "v", "o")),
            *(_linear(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")),
            decoder.input_layernorm.weight.data_ptr(),
            decoder.post_attention_layernorm.weight.data_ptr(),
            *(None if norm is None else norm.weight.data_ptr() for norm in norms),
            decoder.input_layernorm.variance_epsilon,
            attention.scaling,
            int(self._family.config.num_attention_heads),
            self._family.num_kv_heads,
            self._family.head_dim,
            window or 0,
        )

    def drop(self, index: int) -> None:
        """Forget a decoder before its weights go."""
        self._held.pop(index, None)

    def run(self, index: int, hidden: torch.Tensor, step: PagedStep, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Change hidden states (1, tokens, hidden) in place; ``cos`` and ``sin``: (1, tokens, head_dim)."""
        described = self._held[index]
        kv = step.kv
        status = self._run(
            ctypes.byref(described), ctypes.byref(native_step(step)),
            kv.keys[index].data_ptr(), kv.values[index].data_ptr(), cos.data_ptr(), sin.data_ptr(),
            hidden.data_ptr(), self._scratch_for(described, hidden.shape[1]), ctypes.byref(self._seconds),
        )  # fmt: skip
        if status != 0:
            raise ValueError(f"the decoder kernel refused decoder {index}: {status}")

    def take_seconds(self) -> ComputeSeconds:
        """Return what went where since the last call."""
        spent, self._seconds = self._seconds, _Seconds()
        return ComputeSeconds(products_s=spent.products, attention_s=spent.attention, elementwise_s=spent.elementwise)

    def _scratch_for(self, described: _Decoder, tokens: int) -> int:
        needed = self._scratch_floats(ctypes.byref(described), tokens)
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed)
        return self._scratch.data_ptr()


def _linear(module: Any) -> LinearStruct:
    return struct_of(module.weight, module.bias)
