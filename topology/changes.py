"""What changed between two views of a host: devices that came, left, or got another state."""

from dataclasses import dataclass
from enum import Enum

from topology.states import DriverStatus
from topology.topology import HostTopology
from topology.units import format_bytes


class Change(Enum):
    APPEARED = "appeared"
    LEFT = "left"
    HEALTH = "health"
    MEMORY = "memory"  # what others hold
    DRIVER = "driver"


@dataclass(frozen=True, slots=True, kw_only=True)
class TopologyChange:
    """One change, with a sentence for people. ``device_id`` is empty for the driver."""

    kind: Change
    device_id: str
    sentence: str


def changes(old: HostTopology, new: HostTopology, *, memory_step_bytes: int = 1 << 30) -> tuple[TopologyChange, ...]:
    """Return what is different, the worst first: what left, health, driver, memory, what appeared.

    Args:
        memory_step_bytes: Others' memory that changed by less is not told.
    """
    return (*_left(old, new), *_health(old, new), *_driver(old.driver, new.driver), *_rest(old, new, memory_step_bytes))


def _left(old: HostTopology, new: HostTopology) -> list[TopologyChange]:
    here = {device.id for device in new.devices}
    found = []
    for device in old.devices:
        if device.id in here:
            continue
        record = new.gpu(device.id)
        why = "is not there any more" if record is None else record.health.sentence or "takes no work any more"
        found.append(TopologyChange(kind=Change.LEFT, device_id=device.id, sentence=f"{device.id} left: {why}"))
    return found


def _health(old: HostTopology, new: HostTopology) -> list[TopologyChange]:
    before = {gpu.uuid: gpu.health.state for gpu in old.gpus}
    return [
        TopologyChange(
            kind=Change.HEALTH,
            device_id=gpu.uuid,
            sentence=f"{gpu.uuid}: {before[gpu.uuid].value} -> {gpu.health.state.value}"
            + (f" ({gpu.health.sentence})" if gpu.health.sentence else ""),
        )
        for gpu in new.gpus
        if gpu.uuid in before and gpu.health.state is not before[gpu.uuid]
    ]


def _driver(old: DriverStatus, new: DriverStatus) -> list[TopologyChange]:
    if (old.state, old.unreadable) == (new.state, new.unreadable):
        return []
    words = new.sentence or "; ".join(new.unreadable) or "all is well"
    return [TopologyChange(kind=Change.DRIVER, device_id="", sentence=f"driver {new.state.value}: {words}")]


def _rest(old: HostTopology, new: HostTopology, step_bytes: int) -> list[TopologyChange]:
    before = {device.id: device.memory_others_bytes for device in old.devices}
    memory = [
        TopologyChange(
            kind=Change.MEMORY,
            device_id=device.id,
            sentence=f"{device.id}: others hold {format_bytes(device.memory_others_bytes)}, "
            f"{format_bytes(before[device.id])} before",
        )
        for device in new.devices
        if device.id in before and abs(device.memory_others_bytes - before[device.id]) >= step_bytes
    ]
    appeared = [
        TopologyChange(kind=Change.APPEARED, device_id=device.id, sentence=f"{device.id} appeared")
        for device in new.devices
        if device.id not in before
    ]
    return [*memory, *appeared]
