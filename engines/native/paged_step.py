"""Where the tokens of one micro-batch lie in the KV cache, and how they attend: what every way to attend is told."""

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engines.native.kv_store import KVStore

if TYPE_CHECKING:
    from engines.native.torch_attention import TorchStep


class NativeStep(ctypes.Structure):
    """A step in the words of ``kernels/paged_attention.h``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_sequences", "max_blocks", "block_tokens")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("table", "rows", "sequence_of", "positions")),
    )


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
        self.native: NativeStep | None = None  # filled at the first layer
        self.torch: TorchStep | None = None  # likewise, where torch attends
