"""The cluster as a hierarchy of shared resources, with marks where scaling happened not long ago.

cluster (storage) -> rack (network) -> server (GPU memory, PCIe) -> devices. A scaling action loads parameters over all
that lies above its devices; each node on that path gets a mark that fades, so that the next action can go elsewhere.

Source: FlexPipe (EuroSys 2026), hierarchical resource graph. Its constants are not published; ours are arguments.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Final

from topology.cluster import ClusterTopology
from topology.device import Device
from topology.link_figures import pcie_peak_bytes_per_s
from topology.topology import HostTopology

CLUSTER_ID: Final = "cluster"
DEFAULT_HALF_LIFE_S: Final = 60.0


class Level(Enum):
    SERVER = "server"
    RACK = "rack"
    CLUSTER = "cluster"


# How much a mark there says against a device below: what few share is busier than what all share.
_WEIGHTS: Final = {Level.SERVER: 1.0, Level.RACK: 0.25, Level.CLUSTER: 0.05}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One shared resource.

    Args:
        bandwidth_bytes_per_s: What all below it share: host to devices of a server, network of a rack, storage of the
            cluster. 0: not known.
        memory_free_bytes: Of all devices below.
    """

    id: str
    level: Level
    parent_id: str
    device_ids: tuple[str, ...]
    memory_free_bytes: int
    bandwidth_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How much scaling a node has seen, as of a time; it halves every half-life."""

    weight: float
    as_of_s: float

    def at(self, now_s: float, *, half_life_s: float) -> float:
        """Return what is left of it. A clock that went back counts as standing still."""
        return float(self.weight * 0.5 ** (max(0.0, now_s - self.as_of_s) / half_life_s))


@dataclass(frozen=True, kw_only=True)
class ResourceGraph:
    """A cluster's hierarchy with its marks. Time is given by the caller, in seconds of any one clock.

    Args:
        storage_bytes_per_s: What the cluster's storage delivers in total; 0: not known.
        marks: By node id.
    """

    cluster: ClusterTopology
    storage_bytes_per_s: float = 0.0
    half_life_s: float = DEFAULT_HALF_LIFE_S
    marks: Mapping[str, Mark] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.half_life_s <= 0:
            raise ValueError(f"a half-life of {self.half_life_s} s")

    @cached_property
    def nodes(self) -> Mapping[str, Node]:
        """Every server, rack and the cluster, by id, from the bottom."""
        racks: dict[str, list[HostTopology]] = {}
        for host in self.cluster.hosts:
            racks.setdefault(host.rack, []).append(host)
        servers = [
            _node(_server_id(host.host_id), Level.SERVER, _rack_id(host.rack), host.devices, _host_bandwidth(host))
            for host in self.cluster.hosts
        ]
        network = self.cluster.network.within_rack.bandwidth_bytes_per_s
        between = [
            _node(_rack_id(rack), Level.RACK, CLUSTER_ID, [each for host in hosts for each in host.devices], network)
            for rack, hosts in racks.items()
        ]
        top = _node(CLUSTER_ID, Level.CLUSTER, "", self.cluster.devices, self.storage_bytes_per_s)
        return {node.id: node for node in (*servers, *between, top)}

    def path(self, device_id: str) -> tuple[Node, ...]:
        """Return what parameters pass on their way to a device: server, rack, cluster. Raises ``UnknownDevice``."""
        host = self.cluster.host_of(device_id)
        return tuple(self.nodes[name] for name in (_server_id(host.host_id), _rack_id(host.rack), CLUSTER_ID))

    def scaled(self, device_ids: Iterable[str], *, now_s: float) -> "ResourceGraph":
        """Return the graph after a scaling action on these devices: each marks every node of its path once."""
        marks = dict(self.marks)
        for device_id in device_ids:
            for node in self.path(device_id):
                marks[node.id] = Mark(weight=self.mark_of(node.id, marks, now_s=now_s) + 1.0, as_of_s=now_s)
        return replace(self, marks=marks)

    def heat(self, device_id: str, *, now_s: float) -> float:
        """Return how much recent scaling lies on a device's path: 0 for none. Prefer devices with little."""
        return sum(_WEIGHTS[node.level] * self.mark_of(node.id, now_s=now_s) for node in self.path(device_id))

    def heats(self, *, now_s: float) -> Mapping[str, float]:
        """Return the heat of each device beyond that of the coolest: what lies on all paths alike tells nothing."""
        found = {device.id: self.heat(device.id, now_s=now_s) for device in self.cluster.devices}
        least = min(found.values(), default=0.0)
        return {device_id: heat - least for device_id, heat in found.items() if heat > least}

    def mark_of(self, node_id: str, marks: Mapping[str, Mark] | None = None, *, now_s: float) -> float:
        """Return what is left of a node's mark."""
        mark = (self.marks if marks is None else marks).get(node_id)
        return 0.0 if mark is None else mark.at(now_s, half_life_s=self.half_life_s)

    def coolest(self, device_ids: Iterable[str], *, now_s: float) -> tuple[str, ...]:
        """Return devices by recent scaling on their path, the least first; else in the order given."""
        return tuple(sorted(device_ids, key=lambda device_id: self.heat(device_id, now_s=now_s)))

    def with_cluster(self, cluster: ClusterTopology, *, now_s: float, forget_below: float = 1e-3) -> "ResourceGraph":
        """Return the graph of a newer view of the cluster, without the marks that have faded or whose node is gone."""
        new = replace(self, cluster=cluster)
        kept = {
            name: mark
            for name, mark in self.marks.items()
            if name in new.nodes and mark.at(now_s, half_life_s=self.half_life_s) >= forget_below
        }
        return replace(new, marks=kept)


def _node(node_id: str, level: Level, parent_id: str, devices: Iterable[Device], bandwidth: float) -> Node:
    below = tuple(devices)
    return Node(
        id=node_id,
        level=level,
        parent_id=parent_id,
        device_ids=tuple(device.id for device in below),
        memory_free_bytes=sum(device.memory_usable_bytes for device in below),
        bandwidth_bytes_per_s=bandwidth,
    )


def _host_bandwidth(host: HostTopology) -> float:
    """Return what the PCIe ports of a host's GPUs carry together; 0 for a host of CPU devices."""
    whole = [gpu.pcie for gpu in host.gpus if not gpu.is_mig_instance]
    return sum(
        pcie_peak_bytes_per_s(generation=port.max_generation, width=port.current_width or port.max_width)
        for port in whole
    )


def _server_id(host_id: str) -> str:
    return f"server:{host_id}"


def _rack_id(rack: str) -> str:
    return f"rack:{rack}"
