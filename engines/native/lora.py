"""LoRA adapters: read from the directories that peft writes, and added to the outputs of the modules they are for.

Those of the configuration are read before the first fork, so that every worker has them and one copy is in memory for
all. Those that come later (`engines.native.adapters`) are read by each worker. A worker has all layers of an adapter,
whichever it carries: a layer's part is there wherever the layer goes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from engines.errors import UnsupportedByEngine
from engines.native.family import Family

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_PARTS: Final = {"lora_A.weight": 0, "lora_B.weight": 1}
# What changes the result and is not computed here; the values that say "not in use".
_UNUSED: Final[dict[str, tuple[object, ...]]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """``pairs``: by module of the model, what it adds: (in, rank) and (rank, out), the scale in the latter."""

    name: str
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return sum(half.nbytes for pair in self.pairs.values() for half in pair)


def read_adapter(name: str, directory: Path, family: Family) -> Adapter:
    """Read an adapter as peft saves it.

    Raises:
        UnsupportedByEngine: It cannot be read, is for another model, or does what is not computed here; says which.
    """
    for needed in (_CONFIG, _WEIGHTS):
        if not (directory / needed).exists():
            there = f"it has no {needed}" if directory.is_dir() else "there is no such directory"
            raise UnsupportedByEngine(f"adapter {name!r} in {directory}: {there}")
    try:
        config = json.loads((directory / _CONFIG).read_text())
        halves = _halves(directory / _WEIGHTS)
        scale = _scale(config)
        return Adapter(name=name, pairs={path: _pair(path, ab, scale, family) for path, ab in halves.items()})
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedByEngine(f"adapter {name!r} in {directory}: {error}") from error


def _scale(config: dict[str, Any]) -> float:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type {config.get('peft_type')!r} is not supported, only LORA")
    for key, unused in _UNUSED.items():
        if config.get(key) not in unused:
            raise ValueError(f"{key} is not supported")
    rank = int(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _halves(file: Path) -> dict[str, list[torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, dict[int, torch.Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                path, part = _taken_apart(key)
                found.setdefault(path, {})[part] = opened.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{file.name}: {error}") from error
    lone = next((path for path, parts in found.items() if len(parts) != len(_PARTS)), None)
    if lone is not None:
        raise ValueError(f"{lone} has half of a pair only")
    return {path: [parts[0], parts[1]] for path, parts in found.items()}


def _taken_apart(key: str) -> tuple[str, int]:
    for ending, part in _PARTS.items():
        if key.startswith(_PREFIX) and key.endswith(f".{ending}"):
            return key[len(_PREFIX) : -len(ending) - 1], part
    raise ValueError(f"the tensor {key} is none of a LoRA adapter")


def _pair(path: str, halves: Sequence[torch.Tensor], scale: float, family: Family) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a module's pair as it is applied; refuse one for a module that is not a plain linear part of a decoder."""
    decoders = f"{family.places.base}.{family.places.decoders}."
    if not path.startswith(decoders) or ".experts." in path:
        raise ValueError(f"{path} is not supported: only linear modules of decoders are, and no experts")
    try:
        module = family.model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the model has no module {path}") from None
    taken, given = sizes_of(path, module)
    down, up = halves
    if down.shape[1] != taken or up.shape[0] != given or down.shape[0] != up.shape[1]:
        shapes = f"{list(down.shape)} and {list(up.shape)}"
        raise ValueError(f"{path} takes {taken} values and gives {given}, which {shapes} do not fit")
    return down.to(family.dtype).T.contiguous(), (up.float() * scale).to(family.dtype).T.contiguous()


def sizes_of(path: str, module: nn.Module) -> tuple[int, int]:
    """Return how many values a linear module takes and gives. Raises: ValueError: It is none."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None:  # GPT-2's: a linear module the other way round
        return int(weight.shape[0]), int(weight.shape[1])
    raise ValueError(f"{path} is a {type(module).__name__}, which is not supported")


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
