"""What a refactoring moves: the layers that lie elsewhere in the target layout, with their bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from planner.errors import InvalidLayout
from planner.holdings import Holding, kv_bytes, placed, weight_bytes
from planner.layout import Pipeline
from planner.model_graph import Layer, LayerKind, ModelGraph
from topology.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A layer, or a share of it, that a device gets. A tied table that the device has already is not counted."""

    layer: str
    from_device: str
    to_device: str
    weight_bytes: int
    kv_bytes: int


def moves(current: Pipeline, target: Pipeline, graph: ModelGraph, *, live_kv_slots: int = 0) -> tuple[Move, ...]:
    """Return the moves from ``current`` to ``target``, in the order of the layers.

    ``live_kv_slots`` is the number of token slots whose keys and values travel with each decoder.

    Raises:
        InvalidLayout: A pipeline does not have the model's number of decoders.
    """
    for pipeline in (current, target):
        require_decoders(pipeline, graph)
    before = placed(current, graph)
    found: list[Move] = []
    for device, wanted in placed(target, graph).items():
        there = before.get(device, ())
        for holding in wanted:
            if holding not in there:
                found.append(_move(holding, device, there, current, graph, live_kv_slots))
                there = (*there, holding)
    order = {layer.name: index for index, layer in enumerate(graph.layers)}
    return tuple(sorted(found, key=lambda move: order[move.layer]))


def require_decoders(pipeline: Pipeline, graph: ModelGraph) -> None:
    """Raise InvalidLayout unless the pipeline places the model's decoders, no more and no fewer."""
    if pipeline.num_decoders != graph.num_decoders:
        raise InvalidLayout(
            f"the model has {graph.num_decoders} decoder layers, but the layout places {pipeline.num_decoders}"
        )


def describe_moves(found: Sequence[Move]) -> str:
    """Return one line for people: ``layers 2-3 cpu:0 -> cpu:2, 6-7 and head cpu:1 -> cpu:3; 4.3 MiB weights, ...``."""
    if not found:
        return "nothing moves"
    routes = []
    for (source, target), group in groupby(found, key=lambda move: (move.from_device, move.to_device)):
        routes.append(f"{join_layer_names([move.layer for move in group])} {source} -> {target}")
    weights, kv = sum(move.weight_bytes for move in found), sum(move.kv_bytes for move in found)
    return f"layers {', '.join(routes)}; {format_bytes(weights)} weights, {format_bytes(kv)} KV"


def join_layer_names(names: Sequence[str]) -> str:
    """Return layer names with runs of decoders drawn together: ``embedding and 0-3``, ``6-7 and head``."""
    return " and ".join(_runs(names))


def _runs(names: Sequence[str]) -> Iterator[str]:
    numbers: list[int] = []
    for name in (*names, ""):
        number = _decoder_number(name)
        if number is not None and (not numbers or number == numbers[-1] + 1):
            numbers.append(number)
            continue
        if numbers:
            yield str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        numbers = [] if number is None else [number]
        if number is None and name:
            yield name


def _decoder_number(name: str) -> int | None:
    kind, _, number = name.partition(" ")
    return int(number) if kind == LayerKind.DECODER.value else None


def _move(
    holding: Holding,
    device: str,
    there: tuple[Holding, ...],
    current: Pipeline,
    graph: ModelGraph,
    live_kv_slots: int,
) -> Move:
    return Move(
        layer=holding.layer.name,
        from_device=_source(holding, current, graph),
        to_device=device,
        weight_bytes=weight_bytes((*there, holding), graph) - weight_bytes(there, graph),
        kv_bytes=kv_bytes((holding,), slots=live_kv_slots),
    )


def _source(holding: Holding, current: Pipeline, graph: ModelGraph) -> str:
    """Return the device whose share of the layer covers the start of this one."""
    devices = _stage_devices(holding.layer, current, graph)
    return devices[holding.rank * len(devices) // holding.degree]


def _stage_devices(layer: Layer, current: Pipeline, graph: ModelGraph) -> tuple[str, ...]:
    match layer.kind:
        case LayerKind.EMBEDDING:
            return current.stages[0].device_ids
        case LayerKind.HEAD:
            return current.stages[-1].device_ids
        case LayerKind.DECODER:
            return current.stage_of(graph.decoders.index(layer)).device_ids
