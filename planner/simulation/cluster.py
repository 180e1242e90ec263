"""Devices of a simulated cluster that neighbours use, too: drawn so that they are as fragmented as was measured."""

import random
from collections.abc import Sequence

from planner.simulation.pool import PoolDevice

FLEXPIPE_OCCUPANCY = 0.47  # FlexPipe: GPU memory in use, 43 to 51 % in the mean


def hosts_of(*, devices: int, hosts: int) -> list[str]:
    """Return the host of each device, spread as evenly as that goes."""
    return [f"host-{index * hosts // devices}" for index in range(devices)]


def occupied_devices(
    hosts: Sequence[str], *, total_bytes: int, shares: Sequence[float], occupancy: float, seed: int, choices: int = 2
) -> list[PoolDevice]:
    """Return devices on which neighbours hold ``occupancy`` of the memory in the mean.

    Tasks with the given shares of a device (those of a trace, or others) are drawn, and each goes to the emptiest of
    ``choices`` devices that are drawn, as a scheduler does that spreads load. With two, few devices are left alone.
    """
    draw = random.Random(seed)
    used = [0.0] * len(hosts)
    misses = 0
    while sum(used) < occupancy * len(hosts) and misses < 10_000:
        share, device = (
            draw.choice(shares),
            min((draw.randrange(len(hosts)) for _ in range(choices)), key=used.__getitem__),
        )
        if used[device] + share <= 1.0:
            used[device] += share
        else:
            misses += 1
    return [
        PoolDevice(index=index, host=host, total_bytes=total_bytes, others_bytes=int(share * total_bytes))
        for index, (host, share) in enumerate(zip(hosts, used, strict=True))
    ]


def mostly_free(devices: Sequence[PoolDevice], *, share: float = 0.85) -> float:
    """Return the part of the devices of which more than ``share`` is free: FlexPipe measured 8.7 % for 85 %."""
    return sum(device.free_bytes > share * device.total_bytes for device in devices) / max(1, len(devices))
