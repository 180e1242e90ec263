"""The layers of one worker: which it holds, how one is put into the forward pass and taken out of it again.

A layer that comes back later, or comes for the first time, needs its Python objects: a *skeleton*, built once at start
(before requests are served) without weights. To adopt a layer is then to give its parameters tensors that exist
already, which takes microseconds; to drop it is to take them away.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from flexpiped_served.finding import found_in
from flexpiped_served.kv import CacheForm
from flexpiped_served.processes import trim_heap

from flexpiped_vllm import internals


@dataclass(slots=True)
class MadeLayers:
    """One call of vLLM's ``make_layers``: how the model makes its layers."""

    prefix: str
    layer_fn: Callable[..., torch.nn.Module]
    modules: torch.nn.ModuleList
    bytes_of: dict[int, int] = field(default_factory=dict)  # of weights as loaded, before they are packed
    forms: dict[int, list[tuple[str, list[int], str]]] = field(default_factory=dict)  # of each parameter, as loaded

    def describe(self, index: int, layer: torch.nn.Module) -> None:
        """Note what a layer's parameters are like before anything is packed."""
        self.bytes_of[index] = parameter_bytes(layer)
        self.forms[index] = [(name, list(each.shape), str(each.dtype)) for name, each in layer.named_parameters()]


_made: list[MadeLayers] = []


def record_layers() -> None:
    """Have vLLM's ``make_layers`` remember how it made them. Call before a model's module is imported."""
    original = internals.model_utils.make_layers

    def make_layers(num_hidden_layers: int, layer_fn: Any, prefix: str) -> Any:
        start, end, modules = original(num_hidden_layers, layer_fn, prefix)
        made = MadeLayers(prefix=prefix, layer_fn=layer_fn, modules=modules)
        for index in range(start, end):
            made.describe(index, modules[index])
        _made.append(made)
        return start, end, modules

    internals.model_utils.make_layers = make_layers
    for name, module in list(sys.modules.items()):  # a model's module that was imported already has its own name for it
        if name.startswith(internals.model_utils.__package__) and getattr(module, "make_layers", None) is original:
            module.make_layers = make_layers  # type: ignore[attr-defined]


def parameter_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


class LayerStore:
    """The layers of one worker. Only the worker's main thread puts them in and out of the forward pass.

    Raises:
        CannotMove: The model is not built in a way that is understood.
    """

    def __init__(self, runner: Any, config: Any, device: torch.device) -> None:
        self._runner = runner
        self._config = config
        self._device = device
        self._context: dict[str, Any] = config.compilation_config.static_forward_context
        self.made, self.core = find_layers(runner.get_model())
        self._modules: dict[int, torch.nn.Module] = {}  # of layers held or known, by index
        self._attention: dict[int, dict[str, Any]] = {}  # attention modules by layer and name
        self._group_names = self._names_lists()
        for index in self.held():
            self._modules[index] = self.made.modules[index]
            self._attention[index] = self._registered(index)
        first = self.held()[0]
        self._sibling = next(iter(self._attention[first].values()))
        self._forms = {name: CacheForm.of(cache) for name, cache in self.caches_of(first).items()}
        self.num_layers = len(self.made.modules)
        for index in range(self.num_layers):
            if index not in self._modules:
                self._build_skeleton(index)

    def held(self) -> list[int]:
        """Return the indexes of the layers in the forward pass."""
        missing = internals.model_utils.PPMissingLayer
        return [index for index, module in enumerate(self.made.modules) if not isinstance(module, missing)]

    @property
    def other_bytes(self) -> int:
        """Weights beside the layers: embedding, norm and head where this rank has them."""
        inside = {id(p) for p in self.made.modules.parameters()}
        outside = {id(p): p for p in self._runner.get_model().parameters() if id(p) not in inside}
        return sum(p.numel() * p.element_size() for p in outside.values())

    def absent(self) -> list[torch.nn.Module]:
        """Return the skeletons: layers that are not in the forward pass."""
        held = self.held()
        return [module for index, module in self._modules.items() if index not in held]

    def let_go(self) -> None:
        """In a fork of this worker on the CPU: drop all weights and KV caches of layers.

        Memory that the worker gives back would else stay with the fork.
        """
        for index in self.held():
            self.empty(index)
            self.drop_caches(index)
        self._runner.kv_caches.clear()
        trim_heap()

    def attention_of(self, index: int) -> dict[str, Any]:
        """Return the attention modules of a layer by name; each has a KV cache of its own."""
        return self._attention[index]

    def bytes_of(self, index: int) -> int:
        return self.made.bytes_of[index]

    # --- for a handover's other threads: nothing here is seen by the forward pass ---

    def caches_of(self, index: int) -> dict[str, torch.Tensor]:
        return {self._part(index, name): module.kv_cache for name, module in self._attention[index].items()}

    def new_caches(self, index: int) -> dict[str, torch.Tensor]:
        return {
            self._part(index, name): self._forms[self._part(index, name)].allocate() for name in self._attention[index]
        }

    def drop_caches(self, index: int) -> None:
        for module in self._attention[index].values():
            module.kv_cache = torch.empty(0)

    def fill(self, index: int, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        """Give a layer outside the forward pass its weights; yields between pieces of work."""
        layer = self._modules[index]
        for name, tensor in tensors.items():
            owner, _, last = name.rpartition(".")
            setattr(layer.get_submodule(owner), last, torch.nn.Parameter(tensor, requires_grad=False))
        yield
        # Packing for the CPU's kernels happens here, in C++ without the interpreter lock.
        model_config = self._config.model_config
        internals.process_weights_after_loading(layer, model_config, self._device)
        for module in self._attention[index].values():
            if hasattr(self._sibling, "isa"):  # set by the CPU's metadata builder on the layers there at start
                module.isa = self._sibling.isa
        yield

    def empty(self, index: int) -> int:
        """Take the weights of a layer outside the forward pass away; return their bytes."""
        layer = self._modules[index]
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                nothing = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
                setattr(module, name, torch.nn.Parameter(nothing, requires_grad=False))
            if getattr(module, "cpu_linear", None) is not None:
                module.cpu_linear = None  # it holds the packed weights
        return self.made.bytes_of[index]

    # --- between two steps, in the main thread ---

    def put_in(self, index: int, caches: dict[str, torch.Tensor]) -> None:
        """Make a filled layer part of the forward pass, with the KV caches of its attention modules."""
        self.made.modules[index] = self._modules[index]
        for name, module in self._attention[index].items():
            cache = caches[self._part(index, name)]
            self._context[name] = module
            module.bind_kv_cache(cache)
            self._runner.kv_caches.append(cache)
            for names in self._group_names:
                if name not in names:
                    names.append(name)

    def take_out(self, index: int) -> None:
        """Take a layer out of the forward pass. Its weights and KV caches remain until they are emptied."""
        self.made.modules[index] = internals.model_utils.PPMissingLayer()
        for name, module in self._attention[index].items():
            del self._context[name]
            address = module.kv_cache.data_ptr()
            kept = [cache for cache in self._runner.kv_caches if cache.data_ptr() != address]
            self._runner.kv_caches[:] = kept
            for names in self._group_names:
                if name in names:
                    names.remove(name)

    def set_range(self, first: int, end: int) -> None:
        """Say which layers the forward pass runs, and forget what vLLM remembers of the missing ones."""
        self.core.start_layer, self.core.end_layer = first, end
        internals.model_utils._model_to_pp_missing_layer_names.clear()

    # --- inside ---

    def _part(self, index: int, name: str) -> str:
        """Return the name of an attention module within its layer."""
        return name.removeprefix(f"{self.made.prefix}.{index}.")

    def _names_lists(self) -> list[list[str]]:
        """Return the lists of layer names that steps read: of the KV cache group and its attention groups."""
        lists = [group.layer_names for group in self._runner.kv_cache_config.kv_cache_groups]
        lists += [group.layer_names for groups in self._runner.attn_groups for group in groups]
        return list({id(names): names for names in lists}.values())

    def _registered(self, index: int) -> dict[str, Any]:
        prefix = f"{self.made.prefix}.{index}."
        return {name: module for name, module in self._context.items() if name.startswith(prefix)}

    def _build_skeleton(self, index: int) -> None:
        """Build a layer that this rank lacks. Its weights are allocated, never touched, and let go at once."""
        layer = build_layer(self.made, index, self._config, self._device)
        self.made.describe(index, layer)
        self._modules[index] = layer
        self._attention[index] = self._registered(index)
        for name in self._attention[index]:
            del self._context[name]
        self.empty(index)


def build_layer(made: MadeLayers, index: int, config: Any, device: torch.device) -> torch.nn.Module:
    """Return layer ``index`` as the model itself would build it, with uninitialised weights."""
    with (
        internals.set_current_vllm_config(config, check_compile=False),
        internals.set_default_torch_dtype(config.model_config.dtype),
        device,
    ):
        return made.layer_fn(prefix=f"{made.prefix}.{index}")


def find_layers(model: torch.nn.Module) -> tuple[MadeLayers, Any]:
    """Return how the layers were made, and the module whose forward runs them. Raises: CannotMove."""
    return found_in(model, _made)
