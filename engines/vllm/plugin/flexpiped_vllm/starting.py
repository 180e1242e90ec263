"""A rank's first layers: kept in the memory of the host, where the daemon keeps any."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from flexpiped_served.first_layers import FirstLayers, say, where_layers_are
from flexpiped_served.keeping import KeptLayers

from flexpiped_vllm import internals, refusals
from flexpiped_vllm.layers import MadeLayers, find_layers
from flexpiped_vllm.loading import key_of_layer, load_layer
from flexpiped_vllm.settings import Settings


class Starting:
    """What becomes of one rank's loading. ``kept``: by which it has asked the keeper; None: it has not."""

    def __init__(self, config: Any, settings: Settings) -> None:
        self._config = config
        self._settings = settings
        self.kept: KeptLayers | None = None

    @contextmanager
    def loading(self) -> Iterator[None]:
        """In this scope vLLM loads its model."""
        if not self._settings.parameters:
            yield
            return
        refusal = internals.check() or refusals.of_first_layers(self._config)
        if refusal:
            say(f"all layers come from the files: {refusal}")
            yield
            return
        with internals.default_loading_by(self._load):
            yield

    def _load(self, loader: Any, model: Any, model_config: Any, load: Callable[[], None]) -> None:
        first = self._first_layers(loader, model, model_config) if self.kept is None else None
        if first is None:
            load()
            return
        loader.counter_before_loading_weights = time.perf_counter()  # else set by an iterator that is not asked
        with first.standing_in(model):
            load()

    def _first_layers(self, loader: Any, model: Any, model_config: Any) -> FirstLayers | None:
        found = where_layers_are(lambda: (find_layers(model), internals.safetensors_files(loader, model_config, model)))
        if found is None:
            return None
        (made, _), files = found
        self.kept = kept_layers(self._settings, model, made, self._config)
        layers = {index: made.modules[index] for index in sorted(made.forms)}
        return FirstLayers(self.kept, layers, prefix=made.prefix, files=files)


def kept_layers(settings: Settings, model: torch.nn.Module, made: MadeLayers, config: Any) -> KeptLayers:
    """Return what asks the keeper for layers of ``model``, and loads those that it lacks."""
    of = (model, made, config)
    return KeptLayers(settings, partial(load_layer, *of), key_of=partial(key_of_layer, *of))
