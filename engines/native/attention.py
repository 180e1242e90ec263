"""Paged attention behind transformers' attention interface: one registered function serves every model family.

It writes the step's new keys and values into the layer's KV cache and attends over each sequence's KV blocks. On the
CPU in float32 a compiled kernel does it; for everything else, and where there is no compiler, torch operations do.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engines.native.kv_store import KVStore

ATTENTION_NAME = "flexpiped_paged"
_BLOCK_MULTIPLE, _MAX_HEAD_DIM, _MAX_GROUP = 16, 256, 16  # of paged_attention.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How the attention of one layer makes its scores, and which count. As transformers' modules pass them on."""

    scale: float
    window_tokens: int | None = None  # a token attends to so many, itself included; None: to all before it
    softcap: float | None = None  # scores go through softcap * tanh(score / softcap)


class PagedStep:
    """Where the tokens of one micro-batch lie: the same for every layer.

    ``positions`` and ``sequence_of`` have one entry per token, ``rows`` one per sequence; all int32 and contiguous.
    """

    def __init__(
        self,
        *,
        table: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int32],
        counts: npt.NDArray[np.int32],
        kv_block_tokens: int,
        kv: KVStore,
    ) -> None:
        self.kv = kv
        self.table = table
        self.rows = rows
        self.starts = starts
        self.counts = counts
        self.kv_block_tokens = kv_block_tokens
        self.sequence_of = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        ends = np.cumsum(counts, dtype=np.int32)
        self.positions = np.arange(ends[-1], dtype=np.int32) + np.repeat(starts - (ends - counts), counts)
        self.ends = ends
        self.native: _Step | None = None  # filled at the first layer
        self.slots: torch.Tensor | None = None  # filled by the torch path at its first layer


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_sequences", "max_blocks", "block_tokens")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("table", "rows", "sequence_of", "positions")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("token_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64))


def fits_kernel(head_dim: int, num_heads: int, num_kv_heads: int, kv_block_tokens: int) -> bool:
    """Say whether ``paged_attention.c`` can do this shape. The limits are its own."""
    return (
        head_dim <= _MAX_HEAD_DIM and num_heads <= _MAX_GROUP * num_kv_heads and kv_block_tokens % _BLOCK_MULTIPLE == 0
    )


def native_step(step: PagedStep) -> _Step:
    """Return the step in C's words, made once; heads and scores are for each layer to say."""
    if step.native is None:
        step.native = _Step(
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


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, layer: int, step: PagedStep
) -> torch.Tensor:
    """The same with torch operations, sequence by sequence; any dtype and device."""
    keys, values = step.kv.keys[layer], step.kv.values[layer]
    size = step.kv_block_tokens
    if step.slots is None:
        blocks = step.table[step.rows[step.sequence_of], step.positions // size].astype(np.int64)
        step.slots = torch.from_numpy(blocks * size + step.positions % size).to(keys.device)
    keys.index_copy_(0, step.slots, k[0].transpose(0, 1))
    values.index_copy_(0, step.slots, v[0].transpose(0, 1))
    groups = q.shape[1] // k.shape[1]
    out = torch.empty(1, q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype, device=q.device)
    for row, start, count, end in zip(step.rows, step.starts, step.counts, step.ends, strict=True):
        context = int(start) + int(count)
        window = scores.window_tokens or context
        first = max(0, int(start) - window + 1) // size  # KV block of the oldest key that counts
        blocks = torch.from_numpy(step.table[row, first : -(-context // size)].astype(np.int64)).to(keys.device)
        shape = (-1, size, *keys.shape[1:])
        past_k = keys.view(shape)[blocks].flatten(0, 1)[: context - first * size].transpose(0, 1)
        past_v = values.view(shape)[blocks].flatten(0, 1)[: context - first * size].transpose(0, 1)
        at = torch.arange(int(start), context, device=q.device)[:, None]
        of = torch.arange(first * size, context, device=q.device)[None, :]
        attended = _attend(
            q[0, :, int(end) - int(count) : int(end)],
            past_k.repeat_interleave(groups, 0),
            past_v.repeat_interleave(groups, 0),
            (of <= at) & (of > at - window),
            scores,
        )
        out[0, int(end) - int(count) : int(end)] = attended.transpose(0, 1)
    return out


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Attend within one sequence; q, k, v: (heads, tokens, head_dim), mask: (queries, keys)."""
    if scores.softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scale)
    capped = scores.softcap * torch.tanh(q @ k.transpose(1, 2) * scores.scale / scores.softcap)
    weights = capped.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


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
