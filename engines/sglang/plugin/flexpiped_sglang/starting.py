"""A rank's first layers: kept in the memory of the host, where the daemon keeps any."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from flexpiped_served.finding import CannotMove
from flexpiped_served.first_layers import FirstLayers, where_layers_are
from flexpiped_served.keeping import KeptLayers

from flexpiped_sglang import internals
from flexpiped_sglang.layers import MadeLayers, find_layers
from flexpiped_sglang.loading import key_of_layer, load_layer
from flexpiped_sglang.settings import Settings


def keep_first_layers(settings: Settings) -> None:
    """Have SGLang's loader ask the keeper, if there is one. Call before a model is loaded."""
    if settings.parameters:
        internals.load_by(partial(_load, settings))


def kept_by(loader: Any) -> KeptLayers | None:
    """Return by which a loader has asked the keeper for the first layers; None: it has not."""
    kept: KeptLayers | None = getattr(loader, "flexpiped_kept", None)
    return kept


def kept_layers(
    settings: Settings, model: Any, made: MadeLayers, core: torch.nn.Module, loader: Any, model_config: Any
) -> KeptLayers:
    """Return what asks the keeper for layers of ``model``, and loads those that it lacks."""
    load = partial(load_layer, model, made, core, loader, model_config)
    return KeptLayers(settings, load, key_of=partial(key_of_layer, model, made, loader, model_config))


def _load(settings: Settings, loader: Any, model_config: Any, model: Any, load: Any) -> None:
    """Load a model as ``load()`` does."""
    first = _first_layers(settings, loader, model_config, model)
    if first is None:
        load()
        return
    with first.standing_in(model):
        load()


def _first_layers(settings: Settings, loader: Any, model_config: Any, model: Any) -> FirstLayers | None:
    found = where_layers_are(partial(_find, loader, model_config, model))
    if found is None:
        return None
    (made, core), files = found
    loader.flexpiped_kept = kept = kept_layers(settings, model, made, core, loader, model_config)
    layers = {index: made.layers[index] for index in range(made.first, made.end)}
    return FirstLayers(kept, layers, prefix=made.prefix, files=files)


def _find(loader: Any, model_config: Any, model: Any) -> tuple[tuple[MadeLayers, Any], list[Path] | None]:
    refusal = internals.refusal_of_first_layers(model_config)
    if refusal:
        raise CannotMove(refusal)
    return find_layers(model), internals.safetensors_files(loader, model_config, model)
