"""Families with learnt positions, added to the token embedding: only the first stage sees them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from engines.errors import UnsupportedByEngine
from engines.native.family import Family, Places


class LearntFamily(Family):
    """Decoders are given nothing but hidden states."""

    def step_arguments(self, positions: torch.Tensor) -> Sequence[dict[str, Any]]:  # noqa: ARG002
        return [{}] * self.num_decoders


class Gpt2Family(LearntFamily):
    places: ClassVar[Places] = Places(base="transformer", table="wte", decoders="h", before=("wpe",), after=("ln_f",))

    @classmethod
    def check(cls, config: Any, *, max_model_len: int) -> None:  # noqa: ARG003
        if config.add_cross_attention:
            raise UnsupportedByEngine("GPT-2 with cross-attention is not supported")
        if config.reorder_and_upcast_attn:
            raise UnsupportedByEngine("reorder_and_upcast_attn is not supported")

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        learnt: torch.Tensor = self.module("wpe")(positions[None])
        return self.looked_up(tokens) + learnt


class OptFamily(LearntFamily):
    """The smallest ones have a narrower table, with a projection at either end."""

    places: ClassVar[Places] = Places(
        base="model.decoder",
        table="embed_tokens",
        decoders="layers",
        before=("embed_positions", "project_in"),
        after=("final_layer_norm", "project_out"),
    )

    @classmethod
    def check(cls, config: Any, *, max_model_len: int) -> None:  # noqa: ARG003
        if not config.layer_norm_elementwise_affine:
            raise UnsupportedByEngine("layer_norm_elementwise_affine false is not supported")

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = super().embed(tokens, positions)
        project = self.module("project_in")
        if project is not None:
            hidden = project(hidden)
        learnt: torch.Tensor = self.module("embed_positions")(None, position_ids=positions[None])
        return hidden + learnt
