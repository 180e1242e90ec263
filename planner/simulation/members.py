"""The replicas of a fleet, whom they tell, and what they have reserved over time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from planner.simulation.pool import Placed
from planner.simulation.replica import Replica, SimulatedRequest
from planner.simulation.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetEvents:
    """Whom to tell: a request's first token and end, and that others serve now than before."""

    on_first: Callable[[SimulatedRequest], None] = lambda _request: None
    on_end: Callable[[SimulatedRequest], None] = lambda _request: None
    on_layout: Callable[[], None] = lambda: None


class MemberState(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """One replica of the fleet. ``target``: shape and devices that it changes to; ``gone``: whom to tell of its end."""

    replica: Replica
    shape: Shape
    placed: Placed
    state: MemberState
    target: tuple[Shape, Placed] | None = None
    gone: Callable[[bool], None] | None = None


def devices_of(members: Sequence[Member]) -> int:
    """Return how many devices they hold, all together."""
    return sum(len(each.placed.devices) for each in members)


@dataclass(slots=True, kw_only=True)
class Reserved:
    """Integrals over time: devices that replicas hold, and memory shares of devices; the largest number so far."""

    device_s: float = 0.0
    share_s: float = 0.0
    most_devices: int = 0
    counted_s: float = 0.0  # up to when

    def count(self, members: Sequence[Member], *, now_s: float) -> None:
        """Take in the time since the last call, in which nothing has changed."""
        passed_s, self.counted_s = now_s - self.counted_s, now_s
        held = devices_of(members)
        self.device_s += passed_s * held
        self.share_s += passed_s * sum(
            each.placed.bytes_each / device.total_bytes for each in members for device in each.placed.devices
        )
        self.most_devices = max(self.most_devices, held)
