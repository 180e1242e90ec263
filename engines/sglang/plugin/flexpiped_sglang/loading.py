"""In the helper process: has the model's own ``load_weights`` fill one layer."""

from functools import partial
from typing import Any

from flexpiped_served.checkpoint import layer_weights
from flexpiped_served.keeping import layer_key
from flexpiped_served.weights import Manifest, lay_out

from flexpiped_sglang import internals
from flexpiped_sglang.layers import MadeLayers


def load_layer(
    model: Any, made: MadeLayers, core: Any, loader: Any, model_config: Any, index: int
) -> tuple[int, Manifest]:
    """Fill the skeleton of layer ``index``; return the shared memory and where each parameter lies in it."""
    wanted = {name: (each.shape, each.dtype) for name, each in made.parameters[index].items()}
    fd, manifest, views = lay_out(wanted)
    made.fill(index, views)
    made.modules[index] = made.layers[index]
    core.start_layer, core.end_layer = index, index + 1  # load_weights passes over the others
    try:
        files = internals.safetensors_files(loader, model_config, model)
        read_all = partial(internals.all_weights, loader, model_config, model)
        model.load_weights(layer_weights(made.prefix, index, files=files, read_all=read_all))
    finally:
        made.modules[index] = made.missing()
        made.empty(index)
    return fd, manifest


def key_of_layer(model: Any, made: MadeLayers, loader: Any, model_config: Any, index: int) -> str:
    """Return what tells layer ``index`` as this rank has it from all others of this host; empty: nothing does."""
    parallel = internals.get_parallel()
    forms = [(name, list(each.shape), str(each.dtype)) for name, each in made.parameters[index].items()]
    return layer_key(
        *("sglang", internals.VERSION, parallel.tp_rank, parallel.tp_size, index, forms),
        model=model,
        config=model_config,
        files=internals.safetensors_files(loader, model_config, model),
    )
