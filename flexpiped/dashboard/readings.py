"""Points of the plots and the topology, from what the daemon knows to JSON values. Pure.

A reading is a number, or the reason in words why there is none.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import msgspec

from flexpiped.flexctl.topology_lines import labels_of, link_name
from planner.arrivals import Absence, reading_to_wire
from planner.load import Observation
from topology.snapshot import from_json
from topology.topology import HostTopology, pairs

_MOST_DEVICES_WITH_PAIRS: Final = 64  # as ``flexctl topology`` shows them


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The load at one moment. ``cvs`` are of the windows of the observation, the shortest first."""

    time_unix_s: float
    tokens_per_s: float | None
    requests_per_s: float | str
    ttft_s: float | str
    ttft_p99_s: float | str
    tpot_s: float | str
    kv_use: float | str
    cvs: tuple[float | str, ...]


def point_of(seen: Observation, *, time_unix_s: float, tokens_per_s: float | None) -> Point:
    """Return what is drawn of an observation."""
    return Point(
        time_unix_s=time_unix_s,
        tokens_per_s=tokens_per_s,
        requests_per_s=reading_to_wire(seen.windows[0].rate_per_s) if seen.windows else Absence.NOT_YET.value,
        ttft_s=reading_to_wire(seen.ttft_s),
        ttft_p99_s=reading_to_wire(seen.ttft_p99_s),
        tpot_s=reading_to_wire(seen.tpot_s),
        kv_use=reading_to_wire(seen.kv_use),
        cvs=tuple(reading_to_wire(window.cv) for window in seen.windows),
    )


class Series:
    """The last ``kept`` points."""

    def __init__(self, *, kept: int) -> None:
        self._points: deque[Point] = deque(maxlen=kept)

    def add(self, point: Point) -> None:
        self._points.append(point)

    def to_wire(self) -> list[dict[str, Any]]:
        """Return all of them, oldest first."""
        return [asdict(point) for point in self._points]


def topology_to_wire(looked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``Hardware.look`` found, with short names of the devices and what joins each pair of them.

    Of very many devices the pairs are left out: nobody could read them.
    """
    host = from_json(msgspec.json.encode(looked["topology"]))
    if not isinstance(host, HostTopology):
        raise TypeError("a daemon looks at one host")
    are_few = len(host.devices) <= _MOST_DEVICES_WITH_PAIRS
    return {
        "host_id": host.host_id,
        "driver": host.driver.sentence,
        "measured_unix_s": looked["measured_unix_s"],
        "problem": looked["problem"],
        "labels": labels_of(host),
        "devices": [
            asdict(device) | {"kind": device.kind.value, "memory_usable_bytes": device.memory_usable_bytes}
            for device in host.devices
        ],
        "pairs": [
            {
                "a": a.id,
                "b": b.id,
                "kind": link.kind.value,
                "name": link_name(link),
                "bandwidth_bytes_per_s": link.bandwidth_bytes_per_s,
                "latency_s": link.latency_s,
                "is_measured": link.is_measured,
            }
            for a, b, link in pairs(host)
        ]
        if are_few
        else [],
    }
