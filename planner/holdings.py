"""What each device holds under a pipeline: the common ground of moves and of the memory check."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from planner.layout import Pipeline
from planner.model_graph import Layer, ModelGraph


@dataclass(frozen=True, slots=True)
class Holding:
    """A layer on a device, or the ``rank``-th of ``degree`` equal shares of it where a stage is tensor parallel."""

    layer: Layer
    rank: int = 0
    degree: int = 1


def holdings(pipeline: Pipeline, graph: ModelGraph) -> dict[str, tuple[Holding, ...]]:
    """Return what each device of ``pipeline`` has in memory, by device id, in the order of the layers."""
    return _by_device(pipeline, graph.held_layers)


def placed(pipeline: Pipeline, graph: ModelGraph) -> dict[str, tuple[Holding, ...]]:
    """Return the same without what a stage only has because the engine has it on every stage: that never moves."""
    return _by_device(pipeline, graph.stage_layers)


def _by_device(
    pipeline: Pipeline, layers_of: Callable[[Pipeline, int], tuple[Layer, ...]]
) -> dict[str, tuple[Holding, ...]]:
    return {
        device: tuple(Holding(layer, rank, len(stage.device_ids)) for layer in layers_of(pipeline, index))
        for index, stage in enumerate(pipeline.stages)
        for rank, device in enumerate(stage.device_ids)
    }


def weight_bytes(held: Collection[Holding], graph: ModelGraph) -> int:
    """Return the weights of distinct ``held`` on one device. Shares of one cut of the model may share a tied table."""
    groups: dict[tuple[int, int], list[Layer]] = {}
    for holding in held:
        groups.setdefault((holding.rank, holding.degree), []).append(holding.layer)
    return sum(_share(graph.weight_bytes(layers), degree) for (_, degree), layers in groups.items())


def kv_bytes(held: Collection[Holding], *, slots: int) -> int:
    """Return what ``slots`` token slots of KV cache take for ``held`` on one device."""
    return sum(_share(holding.layer.kv_bytes_per_token * slots, holding.degree) for holding in held)


def _share(total: int, degree: int) -> int:
    return -(-total // degree)
