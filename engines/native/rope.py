"""Rotary positions as tables: cosine and sine of every position, worked out once by transformers' own module."""

from collections.abc import Mapping
from typing import Any

import torch

from engines.errors import UnsupportedByEngine

_ALWAYS = ("default", "linear", "llama3", "yarn")
# Beyond a length, these turn with the length of the whole sequence: no table could hold them.
_UP_TO_A_LENGTH = ("dynamic", "longrope")

ByAttention = dict[str | None, tuple[torch.Tensor, torch.Tensor]]


def check_rope(config: Any, parameters: Mapping[str, Any], *, max_model_len: int) -> None:
    """Refuse rotary positions that a table of ``max_model_len`` rows cannot hold.

    Raises:
        UnsupportedByEngine: Names the type, and the length up to which it is possible.
    """
    rope = parameters.get("rope_type", "default")
    if rope in _ALWAYS:
        return
    if rope not in _UP_TO_A_LENGTH:
        known = ", ".join((*_ALWAYS, *_UP_TO_A_LENGTH))
        raise UnsupportedByEngine(f"rope type {rope!r} is not supported yet (supported: {known})")
    length = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
    if max_model_len > length:
        raise UnsupportedByEngine(
            f"rope type {rope!r} is supported up to the {length} tokens at which it begins to scale; "
            f"the longest sequence would have {max_model_len}: set max_model_len = {length} or less"
        )


class RotaryTables:
    """``rotary`` is transformers' module on the CPU. With ``kinds``, each kind of attention has tables of its own."""

    def __init__(self, rotary: Any, *, kinds: tuple[str, ...] = (), max_model_len: int, dtype: torch.dtype) -> None:
        positions = torch.arange(max_model_len)[None]
        like = torch.empty(0, dtype=dtype)
        self._tables: ByAttention = {}
        for kind in kinds or (None,):
            cos, sin = rotary(like, positions, kind) if kind is not None else rotary(like, positions)
            self._tables[kind] = (cos[0], sin[0])

    def move_to(self, device: torch.device) -> None:
        """Have the tables on ``device``."""
        self._tables = {kind: (cos.to(device), sin.to(device)) for kind, (cos, sin) in self._tables.items()}

    def at(self, positions: torch.Tensor) -> ByAttention:
        """Return cosine and sine (1, tokens, rotated) at ``positions`` (tokens), by kind of attention."""
        return {kind: (cos[positions][None], sin[positions][None]) for kind, (cos, sin) in self._tables.items()}
