"""In the helper process: has the model's own ``load_weights`` fill one layer."""

from collections.abc import Iterator
from typing import Any

import torch
from flexpiped_served.keeping import layer_key
from flexpiped_served.weights import Manifest, lay_out, layer_pattern, read_file

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
        model.load_weights(_weights_of(model, made.prefix, loader, model_config, index))
    finally:
        made.modules[index] = made.missing()
        made.empty(index)
    return fd, manifest


def key_of_layer(model: Any, made: MadeLayers, loader: Any, model_config: Any, index: int) -> str:
    """Return what tells layer ``index`` as this rank has it from all others of this host; empty: nothing does."""
    files = internals.safetensors_files(loader, model_config, model)
    if files is None:
        return ""
    parallel = internals.get_parallel()
    forms = [(name, list(each.shape), str(each.dtype)) for name, each in made.parameters[index].items()]
    return layer_key(
        *("sglang", internals.VERSION, type(model).__name__, model_config.hf_config.to_dict()),
        *(model_config.dtype, model_config.quantization),
        *(parallel.tp_rank, parallel.tp_size, index, forms),
        files=files,
    )


def _weights_of(
    model: Any, prefix: str, loader: Any, model_config: Any, index: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the checkpoint's tensors of one layer, as SGLang's loader names them."""
    wanted = layer_pattern(prefix, index)
    files = internals.safetensors_files(loader, model_config, model)
    if files is None:  # another format: read all, keep what is wanted
        for name, tensor in internals.all_weights(loader, model_config, model):
            if wanted.search(name):
                yield name, tensor
        return
    for file in files:
        yield from read_file(file, wanted)
