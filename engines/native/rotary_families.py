"""Families with rotary positions: each stage derives them from the tokens' positions."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from engines.errors import UnsupportedByEngine
from engines.native.experts import keep_experts_apart
from engines.native.family import Family, Places
from engines.native.rope import RotaryTables, check_rope

_ATTENTION = ("full_attention", "sliding_attention")


class RotaryFamily(Family):
    """Llama, and what differs from it only inside of its decoders: Mistral, Phi-3, Qwen 2 and 3."""

    places: ClassVar[Places] = Places(base="model", table="embed_tokens", decoders="layers", after=("norm",))
    rope_by_attention: ClassVar[bool] = False  # each kind of attention has rotary positions of its own

    def __init__(self, model: Any, *, max_model_len: int, dtype: torch.dtype) -> None:
        super().__init__(model, max_model_len=max_model_len, dtype=dtype)
        types = tuple(getattr(self.config, "layer_types", None) or ())
        self._kinds: tuple[str | None, ...] = types if self.rope_by_attention else (None,) * self.num_decoders
        self._tables = RotaryTables(
            type(self.module("rotary_emb"))(self.config),  # on the CPU: its buffers are computed, not loaded
            kinds=tuple(sorted(set(types))) if self.rope_by_attention else (),
            max_model_len=max_model_len,
            dtype=dtype,
        )

    @classmethod
    def check(cls, config: Any, *, max_model_len: int) -> None:
        for kind in getattr(config, "layer_types", None) or ():
            if kind not in _ATTENTION:
                raise UnsupportedByEngine(f"attention {kind!r} is not supported (supported: {', '.join(_ATTENTION)})")
        if getattr(config, "pretraining_tp", 1) != 1:
            raise UnsupportedByEngine("pretraining_tp other than 1 is not supported")
        if getattr(config, "use_bidirectional_attention", None):
            raise UnsupportedByEngine("use_bidirectional_attention is not supported")
        for parameters in cls.ropes(config):
            check_rope(config, parameters, max_model_len=max_model_len)

    @classmethod
    def ropes(cls, config: Any) -> Sequence[Mapping[str, Any]]:
        """Return the parameters of all kinds of rotary positions that the model has."""
        parameters = config.rope_parameters or {}
        return [each or {} for each in parameters.values()] if cls.rope_by_attention else [parameters]

    def move_to(self, device: torch.device) -> None:
        self._tables.move_to(device)

    def step_arguments(self, positions: torch.Tensor) -> Sequence[dict[str, Any]]:
        by_kind = {kind: {"position_embeddings": tables} for kind, tables in self._tables.at(positions).items()}
        return [by_kind[kind] for kind in self._kinds]


class GptNeoxFamily(RotaryFamily):
    """A part of each head is rotated; attention and MLP may read the same hidden states."""

    places: ClassVar[Places] = Places(base="gpt_neox", table="embed_in", decoders="layers", after=("final_layer_norm",))

    def stored_names(self, full: str) -> tuple[str, ...]:
        names = super().stored_names(full)
        return ("embed_out.weight", *names) if full == "lm_head.weight" else names


class Gemma2Family(RotaryFamily):
    """Scaled embeddings, and a soft cap on the logits; windows and caps of attention reach it through its modules."""

    def __init__(self, model: Any, *, max_model_len: int, dtype: torch.dtype) -> None:
        super().__init__(model, max_model_len=max_model_len, dtype=dtype)
        # transformers keeps it in a buffer of the table, which has no memory here
        self._scale = torch.tensor(self.module(self.places.table).scalar_embed_scale).to(dtype)

    def move_to(self, device: torch.device) -> None:
        super().move_to(device)
        self._scale = self._scale.to(device)

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return self.looked_up(tokens) * self._scale

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap


class Gemma3Family(Gemma2Family):
    """Windows and whole contexts alternate, with rotary positions of their own."""

    rope_by_attention: ClassVar[bool] = True


class MixtureFamily(RotaryFamily):
    """A router chooses few of many experts for each token. Here they are kept apart, as checkpoints have them."""

    def __init__(self, model: Any, *, max_model_len: int, dtype: torch.dtype) -> None:
        super().__init__(model, max_model_len=max_model_len, dtype=dtype)
        for index in range(self.num_decoders):
            keep_experts_apart(self.decoder(index), dtype=dtype)


class MixtralFamily(MixtureFamily):
    """Checkpoints have names of their own for the experts."""

    _NAMES: ClassVar[Mapping[str, str]] = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def stored_names(self, full: str) -> tuple[str, ...]:
        stored = full.replace(".mlp.", ".block_sparse_moe.")
        if ".experts." in stored:
            for ours, theirs in self._NAMES.items():
                stored = stored.replace(f".{ours}.", f".{theirs}.")
        return super().stored_names(stored)
