"""The first layers of a new instance: those that are kept come from the memory of the host, not from the files.

An engine's own loader fills them before any helper is there, so this stands in for the ``load_weights`` of the model,
once. Layers that the daemon's keeper has are put in, and the model is given the rest of the checkpoint alone. What it
has read is offered to the keeper before the engine turns it into what its kernels want: layers have the form in which
they come in a move, and either finds what the other has kept.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from flexpiped_served.checkpoint import others_pattern, read_file
from flexpiped_served.finding import CannotMove
from flexpiped_served.keeping import KeptLayers
from flexpiped_served.weights import Manifest, lay_out, mapped

Weights = Iterable[tuple[str, torch.Tensor]]
_EXPECTED = (OSError, RuntimeError, ValueError)  # a start goes on without the keeper, whatever is wrong with it
AnyFound = TypeVar("AnyFound")
AnyFiles = TypeVar("AnyFiles")


class FirstLayers:
    """Of a model that is about to be loaded.

    Args:
        kept: Asks the keeper.
        layers: Those that this rank begins with, by index.
        prefix: Of the names of all layers, as ``model.layers``.
        files: The checkpoint, in the safetensors format.
    """

    def __init__(
        self, kept: KeptLayers, layers: Mapping[int, torch.nn.Module], *, prefix: str, files: Sequence[Path]
    ) -> None:
        self._kept = kept
        self._layers = layers
        self._prefix = prefix
        self._files = files
        self._found: list[int] = []

    @contextmanager
    def standing_in(self, model: Any) -> Iterator[None]:
        """In this scope ``model.load_weights`` is ours."""
        original = model.load_weights
        model.load_weights = lambda weights: self._load(model, original, weights)
        try:
            yield
        finally:
            del model.load_weights  # the class has its own

    def _load(self, model: torch.nn.Module, load_weights: Callable[[Weights], Any], weights: Weights) -> Any:
        """Load as ``load_weights(weights)`` would, and return what it returns: names of what was loaded, or nothing.

        ``weights`` reads nothing until it is asked for something.
        """
        began_s = time.monotonic()
        self._take()
        loaded = load_weights(self._rest() if self._found else weights)
        loaded_s = time.monotonic()
        num_offered = self._offer()
        say(
            f"of the first {len(self._layers)} layers {len(self._found)} came from the memory of the host,"
            f" {len(self._layers) - len(self._found)} from the files, in {loaded_s - began_s:.3f} s;"
            f" {num_offered} of these are kept now, in {time.monotonic() - loaded_s:.3f} s"
        )
        if loaded is None:
            return None
        ours = {id(each) for index in self._found for each in self._layers[index].parameters()}
        return {*loaded, *(name for name, each in model.named_parameters() if id(each) in ours)}

    def _take(self) -> None:
        """Put in what is kept."""
        try:
            for index, layer in self._layers.items():
                there = self._kept.found(index)
                if there is not None:
                    _give(layer, mapped(*there))
                    self._found.append(index)
        except _EXPECTED as error:
            say(f"no more layers are taken from the memory of the host: {type(error).__name__}: {error}")

    def _rest(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what is not there yet; of the other tensors nothing is read."""
        wanted = others_pattern(self._prefix, self._found)
        for file in self._files:
            yield from read_file(file, wanted)

    def _offer(self) -> int:
        """Have kept what was read; return how many layers are. After one that is not, there is room for none."""
        num_kept = 0
        try:
            for index, layer in self._layers.items():
                if index in self._found:
                    continue
                fd, manifest = _copied(layer)
                if not self._kept.offer(index, fd):
                    os.close(fd)
                    break
                tensors = mapped(fd, manifest)
                if all(each.device.type == "cpu" for each in layer.parameters()):
                    _give(layer, tensors)  # the copy that it has read itself is given back
                num_kept += 1
        except _EXPECTED as error:
            say(f"no more layers are kept in the memory of the host: {type(error).__name__}: {error}")
        return num_kept


def where_layers_are(find: Callable[[], tuple[AnyFound, AnyFiles | None]]) -> tuple[AnyFound, AnyFiles] | None:
    """Return what ``find`` does: how the layers were made, and the checkpoint. None: all come from its files.

    Then the log says why.
    """
    try:
        found, files = find()
    except (CannotMove, *_EXPECTED) as error:
        say(f"all layers come from the files: {error}")
        return None
    if files is None:
        say("all layers come from the files, which are not in the safetensors format")
        return None
    return found, files


def _give(layer: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a layer its parameters: on the CPU the memory itself, which others have, too; else a copy."""
    named = dict(layer.named_parameters())
    if named.keys() != tensors.keys():
        raise ValueError("a layer that is kept has other parameters")
    for name, parameter in named.items():
        if parameter.device.type == "cpu":
            parameter.data = tensors[name]
        else:
            parameter.data.copy_(tensors[name])


def _copied(layer: torch.nn.Module) -> tuple[int, Manifest]:
    """Return memory with a copy of a layer's parameters, which nobody has mapped, and what lies where in it."""
    named = {name: parameter.data for name, parameter in layer.named_parameters()}
    fd, manifest, views = lay_out({name: (each.shape, each.dtype) for name, each in named.items()})
    for name, each in named.items():
        views[name].copy_(each)
    return fd, manifest


def say(words: str) -> None:
    """Write a line into the engine's log."""
    print(words, file=sys.stderr, flush=True)
