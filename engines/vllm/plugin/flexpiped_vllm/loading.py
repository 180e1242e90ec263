"""In the helper process: builds a layer as vLLM would, and has the model's own ``load_weights`` fill it."""

from functools import partial
from typing import Any

import torch
from flexpiped_served.checkpoint import layer_weights
from flexpiped_served.keeping import layer_key
from flexpiped_served.weights import Manifest, lay_out

from flexpiped_vllm import internals
from flexpiped_vllm.layers import MadeLayers, build_layer


def load_layer(model: torch.nn.Module, made: MadeLayers, config: Any, index: int) -> tuple[int, Manifest]:
    """Build and fill layer ``index``; return the shared memory and where each parameter lies in it."""
    context = config.compilation_config.static_forward_context
    context.clear()  # else the name would be taken
    layer = build_layer(made, index, config, torch.device("cpu"))
    named = dict(layer.named_parameters())
    fd, manifest, views = lay_out({name: (parameter.shape, parameter.dtype) for name, parameter in named.items()})
    for name, view in views.items():
        named[name].data = view
    kept, made.modules[index] = made.modules[index], layer
    internals.model_utils._model_to_pp_missing_layer_names.clear()
    try:
        with internals.set_current_vllm_config(config, check_compile=False):
            loader = internals.get_model_loader(config.load_config)
            files = internals.safetensors_files(loader, config.model_config, model)
            read_all = partial(loader.get_all_weights, config.model_config, model)
            model.load_weights(layer_weights(made.prefix, index, files=files, read_all=read_all))
    finally:
        made.modules[index] = kept
        for parameter in named.values():
            parameter.data = torch.empty(0, dtype=parameter.dtype)  # nothing here has the memory mapped any more
    return fd, manifest


def key_of_layer(model: torch.nn.Module, made: MadeLayers, config: Any, index: int) -> str:
    """Return what tells layer ``index`` as this rank has it from all others of this host; empty: nothing does."""
    group, loader = internals.get_tp_group(), internals.get_model_loader(config.load_config)
    return layer_key(
        *("vllm", internals.VERSION, config.parallel_config.enable_expert_parallel),
        *(group.rank_in_group, group.world_size, index, made.forms[index]),
        model=model,
        config=config.model_config,
        files=internals.safetensors_files(loader, config.model_config, model),
    )
