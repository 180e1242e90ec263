"""What devices there are and what joins any two of them: the view of planner and engines, of one host or of many."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Protocol

from topology.device import Device, DeviceKind
from topology.errors import UnknownDevice
from topology.gpu import GpuRecord
from topology.gpu_specs import spec_of
from topology.link import Link, LinkKind
from topology.link_figures import pcie_link, shared_memory_link
from topology.states import DriverStatus

PairKey = tuple[str, str]


class Topology(Protocol):
    """Devices, and the link between any two of them."""

    @property
    def devices(self) -> tuple[Device, ...]: ...

    def link(self, a_id: str, b_id: str) -> Link:
        """Return what joins two devices, in constant time. A device is joined to itself by its own memory.

        Raises:
            UnknownDevice: There is no such device.
        """
        ...


def pair_key(a_id: str, b_id: str) -> PairKey:
    """Return the key of a pair, whichever way round."""
    return (a_id, b_id) if a_id < b_id else (b_id, a_id)


@dataclass(frozen=True, kw_only=True)
class HostTopology:
    """One host: its devices, the links between them that are known, and the details of its GPUs.

    A pair without an entry in ``links`` is joined as devices of its kind are by default: CPU devices through shared
    memory, GPUs through the host (``SYS``), a GPU and a CPU device through a host bridge.

    Args:
        links: By ``pair_key``.
        sources: Where the figures are from, for people.
    """

    host_id: str
    devices: tuple[Device, ...]
    links: Mapping[PairKey, Link] = field(default_factory=dict)
    gpus: tuple[GpuRecord, ...] = ()
    driver: DriverStatus = field(default_factory=DriverStatus)
    rack: str = ""
    title: str = ""
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ids = {device.id for device in self.devices}
        if len(ids) != len(self.devices):
            raise ValueError(f"{self.host_id}: two devices have the same id")
        for pair in self.links:
            if pair != pair_key(*pair) or pair[0] == pair[1] or not ids.issuperset(pair):
                raise ValueError(f"{self.host_id}: a link joins {pair[0]} and {pair[1]}")

    @cached_property
    def _by_id(self) -> Mapping[str, Device]:
        return {device.id: device for device in self.devices}

    def link(self, a_id: str, b_id: str) -> Link:
        """Return what joins two devices. Raises ``UnknownDevice``."""
        found = self.links.get(pair_key(a_id, b_id))
        if found is not None:
            return found
        a, b = self.device(a_id), self.device(b_id)
        return own_memory_link(a) if a is b else _default_link(a, b)

    def device(self, device_id: str) -> Device:
        """Return a device by its id. Raises ``UnknownDevice``."""
        try:
            return self._by_id[device_id]
        except KeyError:
            raise UnknownDevice(f"{self.host_id or 'this host'} has no device {device_id}") from None

    def without(self, device_ids: Collection[str]) -> "HostTopology":
        """Return the host as if these devices were not here."""
        if not device_ids:
            return self
        devices = tuple(device for device in self.devices if device.id not in device_ids)
        links = {pair: link for pair, link in self.links.items() if not {*pair} & {*device_ids}}
        return replace(self, devices=devices, links=links)

    def gpu(self, device_id: str) -> GpuRecord | None:
        """Return what is known of a GPU or MIG instance."""
        return next((gpu for gpu in self.gpus if gpu.uuid == device_id), None)


def pairs(topology: Topology) -> Iterator[tuple[Device, Device, Link]]:
    """Yield every pair of devices with its link, in the order of the devices."""
    for a, b in combinations(topology.devices, 2):
        yield a, b, topology.link(a.id, b.id)


def own_memory_link(device: Device) -> Link:
    """Return the link of a device to itself: a copy reads and writes its memory."""
    spec = spec_of(device)
    if spec is None:
        return Link(kind=LinkKind.SAME_DEVICE, bandwidth_bytes_per_s=_UNKNOWN_MEMORY_BYTES_PER_S, latency_s=0.0)
    return Link(kind=LinkKind.SAME_DEVICE, bandwidth_bytes_per_s=spec.memory_bandwidth_bytes_per_s / 2, latency_s=0.0)


_UNKNOWN_MEMORY_BYTES_PER_S = 100e9  # a GPU that gpu_specs does not know: below all that it knows


def _default_link(a: Device, b: Device) -> Link:
    kinds = {a.kind, b.kind}
    if kinds == {DeviceKind.CPU}:
        return shared_memory_link()
    return pcie_link(LinkKind.PHB if DeviceKind.CPU in kinds else LinkKind.SYS, generation=0, width=0)
