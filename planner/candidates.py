"""The devices that may carry a stage, each with what the layout in force holds on it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from planner.holdings import Holding, holdings, weight_bytes
from planner.layout import Pipeline
from planner.model_graph import Layer, LayerKind
from planner.plan import PlanRequest
from topology.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A device, the whole layers on it, and the bytes of all that is on it: weights and KV capacity, no workspace."""

    device: Device
    layers: tuple[Layer, ...] = ()
    held_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """Memory that a stage may add; negative where the device holds more than its budget."""
        return self.device.memory_usable_bytes - self.held_bytes


def candidates(request: PlanRequest, num_stages: int) -> tuple[Candidate, ...]:
    """Return the devices worth considering, in their order.

    Of empty devices with equal memory, no more than ``num_stages`` are: any plan can use the first of them, unless
    their order is fixed.
    """
    held = holdings(request.current, request.graph) if request.current else {}
    found: list[Candidate] = []
    equal: Counter[int] = Counter()
    for device in request.devices:
        if device.id in held:
            found.append(_occupied(device, held[device.id], request))
            continue
        equal[device.memory_usable_bytes] += 1
        if request.fixed_order or equal[device.memory_usable_bytes] <= num_stages:
            found.append(Candidate(device=device))
    return tuple(found)


def equal_candidates(found: Sequence[Candidate]) -> list[list[int]]:
    """Return the positions of candidates that differ in nothing, group by group."""
    groups: dict[int, list[int]] = {}
    for position, candidate in enumerate(found):
        if not candidate.held_bytes:
            groups.setdefault(candidate.device.memory_usable_bytes, []).append(position)
    return list(groups.values())


def kept_bytes(request: PlanRequest, target: Pipeline) -> tuple[int, int]:
    """Return the bytes of weights and KV capacity that stay where they are, and those of the whole target."""
    kept = whole = 0
    found = {candidate.device.id: candidate for candidate in candidates(request, len(request.devices))}
    for index, stage in enumerate(target.stages):
        layers = request.graph.stage_layers(target, index)
        there = found[stage.device_ids[0]].layers
        kept += layer_bytes([layer for layer in layers if layer in there], request)
        whole += layer_bytes(layers, request)
    return kept, whole


def layer_bytes(layers: Sequence[Layer], request: PlanRequest) -> int:
    """Return weights and KV capacity of distinct layers on one device."""
    decoders = sum(layer.kind is LayerKind.DECODER for layer in layers)
    return request.graph.weight_bytes(layers) + decoders * request.kv_bytes_per_decoder


def _occupied(device: Device, held: Sequence[Holding], request: PlanRequest) -> Candidate:
    whole = tuple(holding.layer for holding in held if holding.degree == 1)
    shares = [holding for holding in held if holding.degree > 1]
    decoders = [holding for holding in shares if holding.layer.kind is LayerKind.DECODER]
    kv = sum(-(-request.kv_bytes_per_decoder // holding.degree) for holding in decoders)
    return Candidate(
        device=device, layers=whole, held_bytes=layer_bytes(whole, request) + weight_bytes(shares, request.graph) + kv
    )
