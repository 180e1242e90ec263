"""What a model family is to the native engine: transformers' own modules, taken apart into layers.

A family says where its embedding, decoders and head lie in the model's module tree, and what is special about it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from engines.native.compiled_decoders import CompiledDecoders
from engines.native.linear import LinearOps
from engines.native.paged_step import PagedStep

LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the layers lie: names of modules below ``base``. Those that a model does without are left out.

    ``before`` are the embedding's modules beside its table; ``after`` is what the head runs before the LM head.
    """

    base: str
    table: str
    decoders: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...]


class Family(ABC):
    """One model on the meta device, taken apart into layers named ``embedding``, ``0``, ``1``, ... and ``head``."""

    places: ClassVar[Places]

    def __init__(self, model: Any, *, max_model_len: int, dtype: torch.dtype) -> None:
        self.model = model
        self.config = model.config
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.linear: LinearOps | None = None  # both as ``compile_family`` sets them
        self.compiled: CompiledDecoders | None = None
        self._base = model.get_submodule(self.places.base)

    @classmethod
    @abstractmethod
    def check(cls, config: Any, *, max_model_len: int) -> None:
        """Refuse what the family cannot do exactly, for sequences of up to ``max_model_len`` tokens.

        Raises:
            UnsupportedByEngine: Names the feature.
        """

    @property
    def num_kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.hidden_size // self.config.num_attention_heads)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def num_decoders(self) -> int:
        return int(self.config.num_hidden_layers)

    def modules(self, layer: str) -> dict[str, nn.Module]:
        """Return the modules of a layer by their full name in the model."""
        match layer:
            case "embedding":
                return self._below_base((self.places.table, *self.places.before))
            case "head":
                return {**self._below_base(self.places.after), LM_HEAD: self.model.lm_head}
            case _:
                return {f"{self.places.base}.{self.places.decoders}.{layer}": self.decoder(int(layer))}

    def stored_names(self, full: str) -> tuple[str, ...]:
        """Return the names that a checkpoint may have for a parameter, the likeliest first.

        A tied head lies there as the embedding's table, and some checkpoints leave the outer module's name out.
        """
        names = [full]
        if full == f"{LM_HEAD}.weight":
            names.append(f"{self.places.base}.{self.places.table}.weight")
        return tuple(each for name in names for each in (name, name.partition(".")[2]))

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return hidden states (1, tokens, hidden) of token ids (1, tokens) at ``positions`` (tokens)."""
        return self.looked_up(tokens)

    def looked_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows of the embedding's table, which may lie there in another type."""
        return nn.functional.embedding(tokens, self.module(self.places.table).weight).to(self.dtype)

    def move_to(self, device: torch.device) -> None:  # noqa: B027
        """Put what the family computes with beside parameters on ``device``, for this process alone."""

    @abstractmethod
    def step_arguments(self, positions: torch.Tensor) -> Sequence[dict[str, Any]]:
        """Return what each decoder is given beside the hidden states, by its index."""

    def decoder(self, index: int) -> nn.Module:
        decoders: Any = self.module(self.places.decoders)
        layer: nn.Module = decoders[index]
        return layer

    def run_decoder(
        self, index: int, hidden: torch.Tensor, *, step: PagedStep, arguments: Any, by_modules: bool = False
    ) -> torch.Tensor:
        """Return the hidden states (1, tokens, hidden) after a decoder; those given may be changed.

        Args:
            by_modules: Whether something is hooked to the modules. The bits are those of one call all the same.
        """
        if self.compiled is None or by_modules:
            after: torch.Tensor = self.decoder(index)(hidden, step=step, **arguments)
            return after
        self.compiled.run(index, hidden, step, *arguments["position_embeddings"])
        return hidden

    def parts_s(self) -> dict[str, float]:
        """Return what the time in decoders since the last call went to, by name, where that is known."""
        if self.compiled is None:
            return {}
        spent = self.compiled.take_seconds()
        return {
            "matrix products": spent.products_s,
            "attention": spent.attention_s,
            "norms, rotation, activation": spent.elementwise_s,
        }

    def set_threads(self, threads: int) -> None:
        """Have so many threads compute. Those of torch look for work for a while, and take the cores of the others."""
        torch.set_num_threads(1 if self.compiled is not None else threads)
        if self.linear is not None:
            self.linear.set_threads(threads)

    def attached(self, layer: str) -> None:
        """Take note that a layer's weights are there now."""
        if self.compiled is not None and layer.isdigit():
            self.compiled.attach(int(layer))

    def dropping(self, layer: str) -> None:
        """Take note that a layer's weights are about to go."""
        if self.compiled is not None and layer.isdigit():
            self.compiled.drop(int(layer))

    def keeps(self, owner: nn.Module, leaf: str, stored: torch.dtype) -> bool:
        """Say whether a parameter may stay in the type in which the checkpoint has it."""
        is_matrix = type(owner) is nn.Linear or owner is self.module(self.places.table)
        return self.linear is not None and is_matrix and leaf == "weight" and self.linear.reads(stored)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (rows, vocabulary) of hidden states (rows, hidden)."""
        for module in self._below_base(self.places.after).values():
            hidden = module(hidden)
        return self.cap(self.model.lm_head(hidden)).float()

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what the family makes of the LM head's output."""
        return logits

    def module(self, name: str) -> Any:
        """Return the module of this name below the base; None where the model does without."""
        return getattr(self._base, name, None)

    def _below_base(self, names: Sequence[str]) -> dict[str, nn.Module]:
        found = {f"{self.places.base}.{name}": self.module(name) for name in names}
        return {name: module for name, module in found.items() if module is not None}
