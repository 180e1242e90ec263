"""The devices of a simulated cluster: what neighbours hold of each, what replicas hold, and where one would fit."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

from planner.parameter_cache import default_budget_bytes
from planner.scaling import ScaleConstants, host_affinity
from planner.simulation.host_memory import HostMemory, assigned
from planner.simulation.shape import Shape


@dataclass(slots=True, kw_only=True)
class PoolDevice:
    """One device. ``others_bytes``: of its neighbours; ``held_bytes``: of our replicas."""

    index: int
    host: str
    total_bytes: int
    others_bytes: int = 0
    held_bytes: int = 0
    stages: int = 0

    @property
    def free_bytes(self) -> int:
        return max(0, self.total_bytes - self.others_bytes - self.held_bytes)


class Placing(Enum):
    """Where stages go."""

    FRAGMENTS = "fragments"  # the device that fits best, so that whole ones stay whole
    WHOLE = "whole devices"  # only devices that nobody else uses


@dataclass(slots=True, kw_only=True)
class Placed:
    """Devices of one replica, with the bytes that it holds on each."""

    devices: tuple[PoolDevice, ...]
    stages: tuple[int, ...]  # of each device
    weight_bytes: int  # of a stage
    bytes_each: int
    kv_tokens: int
    is_warm: bool


@dataclass(slots=True, kw_only=True)
class DevicePool:
    """All devices. ``left_host_s``: when parameters last left a host's devices, for its memory (Eq 13).

    ``host_memory_ratio``: a host has so much memory for each byte of its devices' memory; it keeps parameters in the
    share of that which the daemon would take by itself. Servers with GPUs have twice as much, or more.
    """

    devices: Sequence[PoolDevice]
    constants: ScaleConstants = field(default_factory=ScaleConstants)
    host_memory_ratio: float = 2.0
    left_host_s: dict[str, float] = field(default_factory=dict)
    hosts: dict[str, HostMemory] = field(init=False)

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for device in self.devices:
            sizes[device.host] = sizes.get(device.host, 0) + device.total_bytes
        self.hosts = {
            host: HostMemory(budget_bytes=default_budget_bytes(int(size * self.host_memory_ratio)))
            for host, size in sizes.items()
        }

    def find(
        self,
        shape: Shape,
        *,
        now_s: float,
        placing: Placing = Placing.FRAGMENTS,
        freed: Collection[PoolDevice] = (),
        freed_bytes: int = 0,
    ) -> Placed | None:
        """Return where a replica would go, None where it does not fit. Two stages never share a device.

        1. Devices with room for the least KV cache; those that are being freed count as if they were.
        2. By hosts: those that hold the parameters, or have more free devices, first (Eq 13); of equals the fullest
           device that still has room for all the KV cache that the replica can use, then the emptiest ones.
        """
        ours = {device.index for device in freed}

        def free(device: PoolDevice) -> int:
            return device.free_bytes + (freed_bytes if device.index in ours else 0)

        fitting = [  # 1
            device
            for device in self.devices
            if free(device) >= shape.least_bytes
            and (device.stages == 0 or device.index in ours)
            and (placing is Placing.FRAGMENTS or device.others_bytes == 0)
        ]
        if len(fitting) < shape.num_stages:
            return None
        per_host: dict[str, int] = {}
        for device in fitting:
            per_host[device.host] = per_host.get(device.host, 0) + 1

        def rank(device: PoolDevice) -> tuple[float, float, int]:  # 2
            affinity = host_affinity(
                held_ago_s=self._held_ago_s(device.host, now_s),
                free_devices=per_host[device.host],
                constants=self.constants,
            )
            short = max(0, shape.most_bytes - free(device))
            return (short, -affinity - (1.0 if device.index in ours else 0.0), free(device))

        chosen = sorted(fitting, key=rank)[: shape.num_stages]
        kv_tokens = shape.kv_tokens(min(free(device) for device in chosen))
        stages, is_warm = assigned([self.hosts[device.host] for device in chosen])
        return Placed(
            devices=tuple(chosen),
            stages=stages,
            weight_bytes=shape.stage_weight_bytes,
            bytes_each=shape.stage_weight_bytes + int(kv_tokens * shape.stage_kv_bytes_per_token),
            kv_tokens=kv_tokens,
            is_warm=is_warm,
        )

    def room_for(self, shape: Shape, *, placing: Placing = Placing.FRAGMENTS) -> int:
        """Return how many replicas would fit beside those that are there."""
        fitting = sum(
            device.free_bytes >= shape.least_bytes
            and device.stages == 0
            and (placing is Placing.FRAGMENTS or device.others_bytes == 0)
            for device in self.devices
        )
        return fitting // shape.num_stages

    def rooms(self, shape: Shape, *, placing: Placing = Placing.FRAGMENTS) -> list[int]:
        """Return the KV capacity of each replica that would fit, one after the other: later ones get what is left."""
        found: list[Placed] = []
        while (placed := self.find(shape, now_s=0.0, placing=placing)) is not None:
            self._hold(placed)
            found.append(placed)
        for placed in found:  # not ``give_back``: no parameters have been there
            for device in placed.devices:
                device.held_bytes -= placed.bytes_each
                device.stages -= 1
        return [placed.kv_tokens for placed in found]

    def take(self, placed: Placed) -> None:
        """Have a replica hold its devices, and load its stages there."""
        self._hold(placed)
        for device, stage in zip(placed.devices, placed.stages, strict=True):
            self.hosts[device.host].load(stage, len(placed.stages), weight_bytes=placed.weight_bytes)

    def _hold(self, placed: Placed) -> None:
        for device in placed.devices:
            device.held_bytes += placed.bytes_each
            device.stages += 1

    def give_back(self, placed: Placed, *, now_s: float) -> None:
        """Free a replica's devices; its parameters stay in host memory until others want the room."""
        for device in placed.devices:
            device.held_bytes -= placed.bytes_each
            device.stages -= 1
            self.left_host_s[device.host] = now_s

    def resize(self, placed: Placed, shape: Shape, *, kv_tokens: int) -> None:
        """Have a replica hold more or less KV cache on its devices."""
        bytes_each = shape.stage_weight_bytes + int(kv_tokens * shape.stage_kv_bytes_per_token)
        for device in placed.devices:
            device.held_bytes += bytes_each - placed.bytes_each
        placed.bytes_each, placed.kv_tokens = bytes_each, kv_tokens

    def shared(self, placed: Placed) -> int:
        """Return how many devices of a replica neighbours use, too."""
        return sum(device.others_bytes > 0 for device in placed.devices)

    def _held_ago_s(self, host: str, now_s: float) -> float | None:
        left_s = self.left_host_s.get(host)
        return None if left_s is None or not self.hosts[host].names else now_s - left_s
