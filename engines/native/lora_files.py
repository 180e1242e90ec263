"""LoRA adapters read from the directories that peft writes; what is not computed here is refused by name."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import torch
from torch import nn

from engines.errors import UnsupportedByEngine
from engines.native.family import Family
from engines.native.lora import Adapter

T = TypeVar("T")
_CONFIG, _WEIGHTS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX: Final = "base_model.model."
_PARTS: Final = {"lora_A.weight": 0, "lora_B.weight": 1}
# What changes the result and is not computed here; the values that say "not in use".
_UNUSED: Final[dict[str, tuple[object, ...]]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """An adapter's files, or what they were. ``directory`` is for words: it is there that they are from."""

    name: str
    directory: str
    config: Path
    weights: Path

    def refusal(self, reason: object) -> UnsupportedByEngine:
        """Return why the adapter cannot be had."""
        return UnsupportedByEngine(f"adapter {self.name!r} in {self.directory}: {reason}")


class _Config(msgspec.Struct, frozen=True):
    """What an adapter's configuration says of its scale. Modules that a pattern fits have numbers of their own."""

    r: int
    lora_alpha: float
    peft_type: str = ""
    use_rslora: bool | None = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    def rank_of(self, path: str) -> int:
        return _of_module(self.rank_pattern or {}, path, self.r)

    def scale_of(self, path: str) -> float:
        """Return by what a module's product is multiplied; its rank is above 0."""
        rank = self.rank_of(path)
        alpha = _of_module(self.alpha_pattern or {}, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def files_in(name: str, directory: str) -> AdapterFiles:
    """Return the files of an adapter as peft saves it. Raises: UnsupportedByEngine: They are not there."""
    at = Path(directory)
    files = AdapterFiles(name=name, directory=directory, config=at / _CONFIG, weights=at / _WEIGHTS)
    try:
        for needed in (files.config, files.weights):
            if not needed.is_file():  # to open a pipe would wait for who writes
                raise files.refusal(_what_lacks(at, needed.name))
    except (OSError, ValueError) as error:
        raise files.refusal(error) from error
    return files


def _what_lacks(directory: Path, needed: str) -> str:
    if not directory.is_dir():
        return "there is no such directory"
    if needed == _WEIGHTS and (directory / _PICKLED).is_file():
        return f"it has {_PICKLED}, which may run code of its own when it is read; have it saved as {_WEIGHTS}"
    return f"it has no {needed}"


def read_adapter(files: AdapterFiles, family: Family) -> Adapter:
    """Read an adapter as peft saves it.

    Raises:
        UnsupportedByEngine: It cannot be read, is for another model, or does what is not computed here; says which.
    """
    try:
        config = _config(files.config.read_bytes())
        halves = _halves(files.weights)
        return Adapter(name=files.name, pairs={path: _pair(path, ab, config, family) for path, ab in halves.items()})
    except (OSError, ValueError, KeyError, OverflowError, RecursionError, re.error, msgspec.MsgspecError) as error:
        raise files.refusal(error) from error


def _config(raw: bytes) -> _Config:
    known = msgspec.json.decode(raw, type=dict[str, Any])
    if known.get("peft_type") != "LORA":
        raise ValueError(f"peft_type {known.get('peft_type')!r} is not supported, only LORA")
    for key, unused in _UNUSED.items():
        if known.get(key) not in unused:
            raise ValueError(f"{key} is not supported")
    return msgspec.convert(known, _Config)


def _of_module(pattern: Mapping[str, T], path: str, otherwise: T) -> T:
    """Return what a pattern of peft's has for a module: its keys are the ends of paths, or match them."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)


def _halves(file: Path) -> dict[str, list[torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, dict[int, torch.Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                path, part = _taken_apart(key)
                found.setdefault(path, {})[part] = opened.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{_WEIGHTS}: {error}") from error
    if not found:
        raise ValueError(f"{_WEIGHTS} has no tensors")
    lone = next((path for path, parts in found.items() if len(parts) != len(_PARTS)), None)
    if lone is not None:
        raise ValueError(f"{lone} has half of a pair only")
    return {path: [parts[0], parts[1]] for path, parts in found.items()}


def _taken_apart(key: str) -> tuple[str, int]:
    for ending, part in _PARTS.items():
        if key.startswith(_PREFIX) and key.endswith(f".{ending}"):
            return key[len(_PREFIX) : -len(ending) - 1], part
    raise ValueError(f"the tensor {key} is none of a LoRA adapter")


def _pair(
    path: str, halves: Sequence[torch.Tensor], config: _Config, family: Family
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a module's pair as it is applied; refuse one for a module that is not a plain linear part of a decoder."""
    down, up = halves
    _check_shapes(path, down, up, rank=config.rank_of(path), sizes=_sizes_in(family, path))
    # Copies: what is mapped changes with the file.
    pair = _copied(down.to(family.dtype).T), _copied((up.float() * config.scale_of(path)).to(family.dtype).T)
    if not all(torch.isfinite(half).all() for half in pair):
        raise ValueError(f"{path} has values that are not finite in {str(family.dtype).removeprefix('torch.')}")
    return pair


def _copied(half: torch.Tensor) -> torch.Tensor:
    return half.clone(memory_format=torch.contiguous_format)


def _check_shapes(path: str, down: torch.Tensor, up: torch.Tensor, *, rank: int, sizes: tuple[int, int]) -> None:
    shapes = f"{list(down.shape)} and {list(up.shape)}"
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{path} has values of types {down.dtype} and {up.dtype}")
    taken, given = sizes
    inner = down.shape[0] if down.dim() else 0
    if down.shape != (inner, taken) or up.shape != (given, inner):
        raise ValueError(f"{path} takes {taken} values and gives {given}, which {shapes} do not fit")
    if inner != rank or not rank:
        raise ValueError(f"{path} is of rank {rank} by {_CONFIG}, which {shapes} do not fit")


def _sizes_in(family: Family, path: str) -> tuple[int, int]:
    decoders = f"{family.places.base}.{family.places.decoders}."
    if not path.startswith(decoders) or ".experts." in path:
        raise ValueError(f"{path} is not supported: only linear modules of decoders are, and no experts")
    try:
        module = family.model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the model has no module {path}") from None
    return sizes_of(path, module)


def sizes_of(path: str, module: nn.Module) -> tuple[int, int]:
    """Return how many values a linear module takes and gives. Raises: ValueError: It is none."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None:  # GPT-2's: a linear module the other way round
        return int(weight.shape[0]), int(weight.shape[1])
    raise ValueError(f"{path} is a {type(module).__name__}, which is not supported")
