"""Does a refactoring fit? Memory of the current and the target layout together, per device, before anything moves."""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.holdings import Holding, holdings, kv_bytes, weight_bytes
from planner.layout import Pipeline
from planner.model_graph import ModelGraph
from planner.moves import join_layer_names, require_decoders
from topology.device import Device
from topology.units import format_bytes, format_bytes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class KvBudget:
    """KV blocks: ``live_blocks`` hold tokens now; each decoder of either layout has ``capacity_blocks`` reserved."""

    block_tokens: int
    capacity_blocks: int
    live_blocks: int = 0

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or self.capacity_blocks < 0 or self.live_blocks < 0:
            raise ValueError(f"impossible KV budget: {self}")

    @property
    def capacity_slots(self) -> int:
        return self.capacity_blocks * self.block_tokens

    @property
    def live_slots(self) -> int:
        return self.live_blocks * self.block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """One device while both layouts exist. ``gained`` names the layers it gets, drawn together for people."""

    device_id: str
    usable_bytes: int
    held_bytes: int  # by the current layout, workspace included
    gained: str
    gained_weight_bytes: int
    gained_kv_bytes: int  # reserved, live KV blocks included
    gained_live_kv_bytes: int
    gained_workspace_bytes: int  # 0 where the device has a stage of this instance already

    @property
    def free_bytes(self) -> int:
        return max(0, self.usable_bytes - self.held_bytes)

    @property
    def needed_bytes(self) -> int:
        """What must be free for the target layout."""
        return self.gained_weight_bytes + self.gained_kv_bytes + self.gained_workspace_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.free_bytes

    def sentence(self) -> str:
        """Return what is needed of what is free, and for what: ``needs 9 of 96 MiB free on cpu:2: ...``."""
        parts = [f"{format_bytes(self.gained_weight_bytes)} weights"]
        if self.gained_kv_bytes:
            parts.append(f"{format_bytes(self.gained_kv_bytes)} KV ({format_bytes(self.gained_live_kv_bytes)} live)")
        if self.gained_workspace_bytes:
            parts.append(f"{format_bytes(self.gained_workspace_bytes)} workspace")
        amount = format_bytes_of(self.needed_bytes, self.free_bytes)
        short = "" if self.fits else f", {format_bytes(self.needed_bytes - self.free_bytes)} too few"
        return f"needs {amount} free on {self.device_id}{short}: {', '.join(parts)} for {self.gained}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCheck:
    """The verdict. ``refusals`` says why not; ``devices`` are those of both layouts, in the order of the devices."""

    refusals: tuple[str, ...]
    devices: tuple[DeviceMemory, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.refusals

    @property
    def sentences(self) -> tuple[str, ...]:
        """One sentence for each reason against it, or for each device that gains something."""
        return self.refusals or tuple(device.sentence() for device in self.devices if device.gained)


def check_memory(
    *,
    graph: ModelGraph,
    current: Pipeline | None,
    target: Pipeline,
    devices: Sequence[Device],
    kv: KvBudget,
    workspace_bytes: int = 0,
    second_instance: bool = False,
    second_kv: KvBudget | None = None,
) -> MemoryCheck:
    """Say whether every device can hold what it has and what it gets, at once. ``current`` None: a first start.

    ``workspace_bytes`` is what a stage needs beside weights and KV cache, once per device that carries any. As a
    ``second_instance`` the target shares nothing with what is held: each device gets all that the target puts there,
    with the KV cache of ``second_kv`` where that is another engine's.

    Raises:
        InvalidLayout: ``current`` or ``target`` is not a layout of this model.
    """
    for pipeline in (current, target):
        if pipeline is not None:
            require_decoders(pipeline, graph)
    refusals = [
        f"no device {device} is here; the devices are {', '.join(device.id for device in devices)}"
        for device in target.device_ids
        if device not in {device.id for device in devices}
    ]
    new_kv = second_kv or kv
    if new_kv.live_blocks > new_kv.capacity_blocks:
        refusals.append(
            f"{new_kv.live_blocks} KV blocks are live, but the target has room for {new_kv.capacity_blocks}"
        )
    before = holdings(current, graph) if current else {}
    after = holdings(target, graph)
    memory = tuple(
        _device_memory(
            device,
            before.get(device.id, ()),
            after.get(device.id, ()),
            graph,
            (kv, new_kv),
            workspace_bytes,
            second_instance,
        )
        for device in devices
        if device.id in before or device.id in after
    )
    refusals += [device.sentence() for device in memory if not device.fits]
    return MemoryCheck(refusals=tuple(refusals), devices=memory)


def _device_memory(
    device: Device,
    before: tuple[Holding, ...],
    after: tuple[Holding, ...],
    graph: ModelGraph,
    kv: tuple[KvBudget, KvBudget],
    workspace_bytes: int,
    second_instance: bool,
) -> DeviceMemory:
    held_kv, new_kv = kv
    shared = () if second_instance else before
    gained = tuple(holding for holding in after if holding not in shared)
    return DeviceMemory(
        device_id=device.id,
        usable_bytes=device.memory_usable_bytes,
        held_bytes=weight_bytes(before, graph)
        + kv_bytes(before, slots=held_kv.capacity_slots)
        + (workspace_bytes if before else 0),
        gained=join_layer_names([holding.layer.name for holding in gained]),
        gained_weight_bytes=weight_bytes((*shared, *gained), graph) - weight_bytes(shared, graph),
        gained_kv_bytes=kv_bytes(gained, slots=new_kv.capacity_slots),
        gained_live_kv_bytes=kv_bytes(gained, slots=new_kv.live_slots),
        gained_workspace_bytes=workspace_bytes if after and not shared else 0,
    )
