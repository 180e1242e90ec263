"""The layers of one scheduler process: which it holds, how one comes into the forward pass and leaves it.

SGLang builds a rank's own layers only, and ties each to its neighbours. A layer that comes later needs its Python
objects: a *skeleton*, built once at start, in the same stack as the others, and without memory for weights. To adopt a
layer is then to give its parameters tensors that exist already; to drop it is to take them away.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from flexpiped_served.finding import found_in
from flexpiped_served.kv import CacheForm
from flexpiped_served.processes import trim_heap

from flexpiped_sglang import internals


@dataclass(frozen=True, slots=True)
class Described:
    """A parameter of a layer, and what it looks like when it has memory."""

    parameter: torch.nn.Parameter
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(slots=True)
class MadeLayers:
    """One call of SGLang's ``make_layers``: all layers of a model, of which some are in its list."""

    prefix: str
    first: int  # of those held at start
    end: int
    missing: Callable[[], torch.nn.Module]
    layers: dict[int, torch.nn.Module] = field(default_factory=dict)
    parameters: dict[int, dict[str, Described]] = field(default_factory=dict)
    modules: torch.nn.ModuleList = field(default_factory=torch.nn.ModuleList)

    def note(self, index: int, layer: torch.nn.Module) -> torch.nn.Module:
        """Remember a layer as it was built; one that this rank does not hold gives its memory back at once."""
        self.layers[index] = layer
        named = layer.named_parameters()
        self.parameters[index] = {name: Described(each, each.shape, each.dtype) for name, each in named}
        if not self.first <= index < self.end:
            self.empty(index)
        return layer

    def empty(self, index: int) -> None:
        """Take the memory of a layer's parameters away."""
        for name, described in self.parameters[index].items():
            described.parameter.data = torch.empty(0, dtype=described.dtype, device=described.parameter.device)
            self._put(index, name, described.parameter)

    def fill(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Give a layer's parameters memory."""
        for name, described in self.parameters[index].items():
            described.parameter.data = tensors[name]
            self._put(index, name, described.parameter)

    def bytes_of(self, index: int) -> int:
        return sum(described.num_bytes for described in self.parameters[index].values())

    def _put(self, index: int, name: str, parameter: torch.nn.Parameter) -> None:
        owner, _, last = name.rpartition(".")
        setattr(self.layers[index].get_submodule(owner), last, parameter)


_made: list[MadeLayers] = []


def record_layers() -> None:
    """Have SGLang's ``make_layers`` build skeletons, too. Call before a model is built."""
    internals.hook_make_layers(_make_layers)


def _make_layers(
    original: Any,
    num_hidden_layers: int,
    layer_fn: Any,
    pp_rank: int | None = None,
    pp_size: int | None = None,
    prefix: str = "",
    return_tuple: bool = False,
    **more: Any,
) -> Any:
    if pp_rank is None or pp_size is None:
        return original(num_hidden_layers, layer_fn, pp_rank, pp_size, prefix, return_tuple, **more)
    on_cpu = torch.empty(0).device.type == "cpu"  # moves on GPUs are refused: nothing is built there for them
    first, end = internals.get_pp_indices(num_hidden_layers, pp_rank, pp_size)

    def missing() -> torch.nn.Module:
        module: torch.nn.Module = internals.PPMissingLayer(return_tuple=return_tuple)
        return module

    made = MadeLayers(prefix=prefix, first=first, end=end, missing=missing)

    def build(idx: int, prefix: str) -> torch.nn.Module:
        return made.note(idx, layer_fn(idx=idx, prefix=prefix))

    _made.append(made)
    if pp_size == 1 or not on_cpu:
        made.modules, _, _ = original(num_hidden_layers, build, pp_rank, pp_size, prefix, return_tuple, **more)
        return made.modules, first, end
    made.modules, _, _ = original(num_hidden_layers, build, 0, 1, prefix, return_tuple, **more)
    for index in range(num_hidden_layers):
        if not first <= index < end:
            made.modules[index] = missing()
    return made.modules, first, end


class LayerStore:
    """The layers of one scheduler process, and their KV caches. Only its main thread changes the forward pass.

    Raises:
        CannotMove: The model is not built in a way that is understood.
    """

    def __init__(self, model: torch.nn.Module, pool: Any) -> None:
        self.made, self.core = find_layers(model)
        self._model = model
        self._pool = pool
        self._held = list(range(self.made.first, self.made.end))
        self._forms = {"k": CacheForm.of(pool.k_buffer[0]), "v": CacheForm.of(pool.v_buffer[0])}
        # SGLang keeps keys and values of a layer in one piece of memory: each now gets its own, to be given back.
        self._caches = {index: self.new_caches(index) for index in self._held}
        self._show_caches()

    @property
    def other_bytes(self) -> int:
        """Weights beside the layers: embedding, norm and head where this rank has them."""
        inside = {id(p) for p in self.made.modules.parameters()}
        outside = {id(p): p for p in self._model.parameters() if id(p) not in inside}
        return sum(p.numel() * p.element_size() for p in outside.values())

    @property
    def num_layers(self) -> int:
        return len(self.made.modules)

    def held(self) -> list[int]:
        """Return the indexes of the layers in the forward pass."""
        return list(self._held)

    def bytes_of(self, index: int) -> int:
        """Return the bytes of a layer's weights, held or not."""
        return self.made.bytes_of(index)

    def let_go(self) -> None:
        """In a fork of this process on the CPU: drop all weights and KV caches of layers.

        Memory that the process gives back would else stay with the fork.
        """
        for index in self._held:
            self.made.empty(index)
        self._caches.clear()
        self._pool.k_buffer, self._pool.v_buffer = [], []
        trim_heap()

    # --- for a handover's other threads: nothing here is seen by the forward pass ---

    def caches_of(self, index: int) -> dict[str, torch.Tensor]:
        """Return the KV caches of a layer that is held, or was until it was taken out."""
        return self._caches[index]

    def new_caches(self, index: int) -> dict[str, torch.Tensor]:  # noqa: ARG002  all layers are alike
        """Allocate KV caches for a layer. Nothing uses them yet."""
        return {name: form.allocate() for name, form in self._forms.items()}

    def drop_caches(self, index: int) -> None:
        """Let go of the KV caches of a layer outside the forward pass."""
        self._caches.pop(index, None)

    def fill(self, index: int, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        """Give a layer outside the forward pass its weights; yields between pieces of work."""
        self.made.fill(index, tensors)
        yield
        internals.process_weights(self.made.layers[index])
        yield

    def empty(self, index: int) -> int:
        """Take the weights of a layer outside the forward pass away; return their bytes."""
        self.made.empty(index)
        return self.made.bytes_of(index)

    # --- between two steps, in the main thread ---

    def put_in(self, index: int, caches: dict[str, torch.Tensor]) -> None:
        """Make a filled layer part of the forward pass. ``set_range`` shows it to the steps."""
        self._held = sorted([*self._held, index])
        self._caches[index] = caches

    def take_out(self, index: int) -> None:
        """Take a layer out of the forward pass. What it holds stays until it is dropped."""
        self._held.remove(index)

    def set_range(self, first: int, end: int) -> None:
        """Show the steps the layers that are held: ``first`` to ``end``.

        The forward pass asks the layer at ``first`` what comes from the rank before, even where it runs none: a rank
        without layers keeps one skeleton there, which is not run.
        """
        first, end = (first, end) if first < end else (min(first, self.num_layers - 1),) * 2
        shown = set(self._held) | {first}
        for index in range(self.num_layers):
            self.made.modules[index] = self.made.layers[index] if index in shown else self.made.missing()
        for index in shown:
            for module in self.made.layers[index].modules():
                if hasattr(module, "start_layer"):
                    module.start_layer = first
        self.core.start_layer, self.core.end_layer = first, end
        self._show_caches()

    # --- inside ---

    def _show_caches(self) -> None:
        """Have SGLang's pool use the KV caches of the layers that are held."""
        pool = self._pool
        pool.k_buffer = [self._caches[index]["k"] for index in self._held]
        pool.v_buffer = [self._caches[index]["v"] for index in self._held]
        pool.start_layer = self._held[0] if self._held else 0
        pool.layer_num = len(self._held)
        pool.end_layer = pool.start_layer + pool.layer_num - 1
        pool.model_layer_ids = tuple(self._held)
        pool._kv_buffer_descs = pool._build_kv_buffer_descs()
        pool._init_data_ptrs_and_strides()


def find_layers(model: torch.nn.Module) -> tuple[MadeLayers, Any]:
    """Return how the layers were made, and the module whose forward runs them. Raises: CannotMove."""
    return found_in(model, _made)
