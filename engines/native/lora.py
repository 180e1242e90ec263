"""LoRA adapters: added to the outputs of the modules they are for.

Those of the configuration are read before the first fork, so that every worker has them and one copy is in memory for
all. Those that come later (`engines.native.adapters`) are read by each worker. A worker has all layers of an adapter,
whichever it carries: a layer's part is there wherever the layer goes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """``pairs``: by module of the model, what it adds: (in, rank) and (rank, out), the scale in the latter."""

    name: str
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return sum(half.nbytes for pair in self.pairs.values() for half in pair)


class LoraModules:
    """What the adapters of one model add, within a step: number 1 is the first one, 0 stands for none."""

    def __init__(self, adapters: Sequence[Adapter], model: nn.Module) -> None:
        self._model = model
        self._adapters: dict[int, Adapter] = {}
        self._hooked: set[str] = set()
        self._tokens: list[tuple[Adapter, torch.Tensor]] = []  # of the step under way
        self._device = torch.device("cpu")
        for number, adapter in enumerate(adapters, 1):
            self.add(number, adapter)

    def add(self, number: int, adapter: Adapter) -> None:
        """Have one more, between two steps."""
        self._adapters[number] = _moved(adapter, self._device)
        for path in sorted(adapter.pairs.keys() - self._hooked):
            self._model.get_submodule(path).register_forward_hook(partial(self._add, path))
            self._hooked.add(path)

    def drop(self, number: int) -> None:
        """Let go of one, between two steps. Idempotent."""
        self._adapters.pop(number, None)

    def move_to(self, device: torch.device) -> None:
        """Have them where this process computes: a worker's own copy."""
        self._device = device
        self._adapters = {number: _moved(each, device) for number, each in self._adapters.items()}

    def begin(self, adapters: bytes, counts: npt.NDArray[np.int32]) -> None:
        """A step begins. ``adapters`` has the number of each sequence's (int32), ``counts`` how many tokens it has.

        Empty ``adapters``: no sequence has one.
        """
        if not adapters:
            return
        of_token = np.repeat(np.frombuffer(adapters, dtype=np.int32), counts)
        self._tokens = [
            (self._adapters[number], torch.from_numpy(np.flatnonzero(of_token == number)).to(self._device))
            for number in np.unique(of_token).tolist()
            if number
        ]

    @property
    def is_at_work(self) -> bool:
        """Whether the step under way has tokens of any adapter, so that it must go through the modules."""
        return bool(self._tokens)

    def end(self) -> None:
        """What runs from here on is of no request."""
        self._tokens = []

    def _add(self, path: str, _module: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        for adapter, tokens in self._tokens:
            pair = adapter.pairs.get(path)
            if pair is not None:
                down, up = pair
                rows = given[0].flatten(0, -2)[tokens]
                output.view(-1, output.shape[-1]).index_add_(0, tokens, rows @ down @ up)


def _moved(adapter: Adapter, device: torch.device) -> Adapter:
    """Return the adapter on ``device``, itself where it is there already."""
    if device.type == "cpu":
        return adapter
    pairs = {path: (down.to(device), up.to(device)) for path, (down, up) in adapter.pairs.items()}
    return Adapter(name=adapter.name, pairs=pairs)
