"""Paged attention behind transformers' attention interface: one registered function serves every model family.

It writes the step's new keys and values into the layer's KV cache and attends over each sequence's KV blocks. On the
CPU in float32 a compiled kernel does it; for everything else, and where there is no compiler, torch operations do.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch

from engines.native.paged_step import NativeStep, PagedStep, Scores
from engines.native.torch_attention import torch_attention

ATTENTION_NAME = "flexpiped_paged"
_BLOCK_MULTIPLE, _MAX_HEAD_DIM, _MAX_GROUP = 16, 256, 16  # of paged_attention.c


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("token_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64))


def fits_kernel(head_dim: int, num_heads: int, num_kv_heads: int, kv_block_tokens: int) -> bool:
    """Say whether ``paged_attention.c`` can do this shape. The limits are its own."""
    return (
        head_dim <= _MAX_HEAD_DIM and num_heads <= _MAX_GROUP * num_kv_heads and kv_block_tokens % _BLOCK_MULTIPLE == 0
    )


def native_step(step: PagedStep) -> NativeStep:
    """Return the step in C's words, made once; heads and scores are for each layer to say."""
    if step.native is None:
        step.native = NativeStep(
            len(step.positions), len(step.rows), step.table.shape[1], step.kv_block_tokens, 0, 0, 0, 0, 0.0, 0.0,
            step.table.ctypes.data, step.rows.ctypes.data, step.sequence_of.ctypes.data, step.positions.ctypes.data,
        )  # fmt: skip
    return step.native


class CompiledAttention:
    """The float32 kernel of ``kernels/paged_attention.c``."""

    def __init__(self, library: Path) -> None:
        self._function = ctypes.CDLL(str(library)).flexpiped_paged_attention

    @staticmethod
    def supports(q: torch.Tensor, k: torch.Tensor, step: PagedStep) -> bool:
        """Say whether the kernel can do this dtype and shape, in the host's memory."""
        fits = fits_kernel(q.shape[3], q.shape[1], k.shape[1], step.kv_block_tokens)
        return fits and q.dtype is torch.float32 and q.device.type == "cpu"

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, layer: int, step: PagedStep
    ) -> Any:
        """Attend; q, k, v of shape (1, heads, tokens, head_dim); the result is (1, tokens, heads, head_dim)."""
        out = torch.empty(1, q.shape[2], q.shape[1], q.shape[3])
        native = native_step(step)
        native.num_heads, native.num_kv_heads, native.head_dim = q.shape[1], k.shape[1], q.shape[3]
        native.window, native.scale, native.softcap = scores.window_tokens or 0, scores.scale, scores.softcap or 0.0
        keys, values = step.kv.keys[layer].data_ptr(), step.kv.values[layer].data_ptr()
        status = self._function(
            ctypes.byref(native), ctypes.c_void_p(keys), ctypes.c_void_p(values),
            _rows(q), _rows(k), _rows(v), ctypes.c_void_p(out.data_ptr()),
        )  # fmt: skip
        if status != 0:
            raise ValueError(f"the attention kernel does not support head_dim {q.shape[3]} with {q.shape[1]} heads")
        return out


def _rows(tensor: torch.Tensor) -> Any:
    if tensor.stride(3) != 1:
        raise ValueError("head_dim must be contiguous")
    return ctypes.byref(_Rows(tensor.data_ptr(), tensor.stride(2), tensor.stride(1)))


def register(library: Path | None) -> str:
    """Register the attention function with transformers; return its name for ``attn_implementation``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    compiled = CompiledAttention(library) if library is not None else None

    def paged(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object,  # noqa: ARG001
        *,
        scaling: float,
        step: PagedStep,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        scores = Scores(scale=scaling, window_tokens=sliding_window, softcap=softcap)
        if compiled is not None and compiled.supports(query, key, step):
            return compiled(query, key, value, scores, layer, step), None
        return torch_attention(query, key, value, scores, layer, step), None

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged)
    return ATTENTION_NAME
