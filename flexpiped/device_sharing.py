"""Devices that several models share: what one of them holds is not free for another one's plan. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from planner.holdings import holdings, kv_bytes, weight_bytes
from planner.layout import Pipeline
from planner.model_graph import ModelGraph
from topology.device import Device
from topology.topology import HostTopology

Held = Mapping[str, int]  # bytes by device id


def held_by(pipelines: Iterable[Pipeline], graph: ModelGraph, *, kv_tokens: int = 0, kv_device_bytes: int = 0) -> Held:
    """Return what pipelines of one model hold of each device: weights, and the whole KV cache, mapped yet or not.

    That is one for ``kv_tokens``, or has ``kv_device_bytes`` on each device.
    """
    total: Counter[str] = Counter()
    for pipeline in pipelines:
        for device, held in holdings(pipeline, graph).items():
            total[device] += weight_bytes(held, graph) + kv_bytes(held, slots=kv_tokens) + kv_device_bytes
    return total


def together(parts: Iterable[Held]) -> Held:
    """Return what all of them hold."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total


def devices_beside(devices: Sequence[Device], held: Held) -> tuple[Device, ...]:
    """Return the devices as a model sees them beside others that hold so much."""
    return tuple(_with_less(device, held.get(device.id, 0), by_others=True) for device in devices)


def topology_beside(topology: HostTopology, held: Held) -> HostTopology:
    """Return the host as a model sees it beside others that hold so much."""
    return replace(topology, devices=devices_beside(topology.devices, held)) if held else topology


def topology_without(topology: HostTopology, reserved_bytes: int) -> HostTopology:
    """Return the host with so much less of each device, that the model itself has there beside layers and KV cache."""
    if not reserved_bytes:
        return topology
    devices = tuple(_with_less(device, reserved_bytes, by_others=False) for device in topology.devices)
    return replace(topology, devices=devices)


def _with_less(device: Device, held_bytes: int, *, by_others: bool) -> Device:
    taken = min(held_bytes, device.memory_usable_bytes)
    return replace(
        device,
        memory_reserved_bytes=device.memory_reserved_bytes + taken,
        memory_others_bytes=device.memory_others_bytes + taken * by_others,
    )
