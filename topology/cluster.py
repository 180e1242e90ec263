"""Many hosts as one topology: their snapshots merged, with racks and the network between them."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from topology.device import Device, DeviceKind
from topology.errors import BadCluster, UnknownDevice
from topology.gpu import GpuRecord
from topology.link import Link
from topology.link_figures import network_link
from topology.topology import HostTopology, PairKey, pair_key

_TEN_GIGABIT = 10e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What joins hosts.

    Args:
        within_rack: Between two hosts of a rack; hosts without a rack are in one together.
        between_racks: Between hosts of two racks.
        links: By ``pair_key`` of two host ids, where they differ from that.
    """

    within_rack: Link = field(default_factory=lambda: network_link(bits_per_s=_TEN_GIGABIT))
    between_racks: Link = field(default_factory=lambda: network_link(bits_per_s=_TEN_GIGABIT, latency_s=30e-6))
    links: Mapping[PairKey, Link] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ClusterTopology:
    """Hosts whose device ids are unique together. ``merge`` makes it; each host in it is a topology, too."""

    hosts: tuple[HostTopology, ...]
    network: Network = field(default_factory=Network)

    def __post_init__(self) -> None:
        _check_hosts(self.hosts)
        unknown = {name for pair in self.network.links for name in pair} - {host.host_id for host in self.hosts}
        if unknown:
            raise BadCluster(f"the network names hosts that are not here: {', '.join(sorted(unknown))}")

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """Every device, in the order of the hosts."""
        return tuple(device for host in self.hosts for device in host.devices)

    @cached_property
    def _host_of(self) -> Mapping[str, HostTopology]:
        return {device.id: host for host in self.hosts for device in host.devices}

    def host_of(self, device_id: str) -> HostTopology:
        """Return the host of a device. Raises ``UnknownDevice``."""
        try:
            return self._host_of[device_id]
        except KeyError:
            raise UnknownDevice(f"no host has a device {device_id}") from None

    def link(self, a_id: str, b_id: str) -> Link:
        """Return what joins two devices. Raises ``UnknownDevice``."""
        a, b = self.host_of(a_id), self.host_of(b_id)
        return a.link(a_id, b_id) if a is b else self.link_of_hosts(a, b)

    def link_of_hosts(self, a: HostTopology, b: HostTopology) -> Link:
        """Return the network between two hosts."""
        if self.network.links and (own := self.network.links.get(pair_key(a.host_id, b.host_id))) is not None:
            return own
        return self.network.within_rack if a.rack == b.rack else self.network.between_racks

    def without(self, device_ids: Collection[str]) -> "ClusterTopology":
        """Return the cluster as if these devices were not here."""
        return replace(self, hosts=tuple(host.without(device_ids) for host in self.hosts)) if device_ids else self

    def with_host(self, host: HostTopology) -> "ClusterTopology":
        """Return the cluster with a newer view of one host, or with one host more.

        Raises:
            BadCluster: A device of it is another host's.
        """
        new = _with_unique_ids(host)
        if all(old.host_id != host.host_id for old in self.hosts):
            return replace(self, hosts=(*self.hosts, new))
        return replace(self, hosts=tuple(new if old.host_id == host.host_id else old for old in self.hosts))

    def without_host(self, host_id: str) -> "ClusterTopology":
        """Return the cluster without a host that left; nothing changes if it is not here."""
        links = {pair: link for pair, link in self.network.links.items() if host_id not in pair}
        hosts = tuple(host for host in self.hosts if host.host_id != host_id)
        return replace(self, hosts=hosts, network=replace(self.network, links=links))


def merge(
    hosts: Iterable[HostTopology], *, network: Network | None = None, racks: Mapping[str, str] | None = None
) -> ClusterTopology:
    """Return the cluster of these hosts. The ids of CPU devices get their host's id in front: ``node7/cpu:0``.

    Args:
        racks: Rack by host id, where a host's own snapshot does not say or is wrong.

    Raises:
        BadCluster: A host has no id, two have the same, or two have the same device.
    """
    racks = racks or {}
    named = tuple(_with_unique_ids(replace(host, rack=racks.get(host.host_id, host.rack))) for host in hosts)
    return ClusterTopology(hosts=named, network=network or Network())


def _with_unique_ids(host: HostTopology) -> HostTopology:
    """Return the host with ids that are unique in a cluster, and with its own id in each device."""
    if not host.host_id:
        raise BadCluster("a host has no id")
    names = {device.id: _unique_id(device, host.host_id) for device in host.devices}
    if all(old == new for old, new in names.items()) and all(d.host_id == host.host_id for d in host.devices):
        return host
    devices = tuple(replace(each, id=names[each.id], host_id=host.host_id) for each in host.devices)
    links = {pair_key(names[a], names[b]): link for (a, b), link in host.links.items()}
    return replace(host, devices=devices, links=links)


def _unique_id(device: Device, host_id: str) -> str:
    prefix = f"{host_id}/"
    if device.kind is not DeviceKind.CPU or device.id.startswith(prefix):
        return device.id
    return prefix + device.id


def _check_hosts(hosts: tuple[HostTopology, ...]) -> None:
    by_id: dict[str, HostTopology] = {}
    owner: dict[str, str] = {}
    for host in hosts:
        if by_id.setdefault(host.host_id, host) is not host:
            raise BadCluster(f"two hosts are called {host.host_id}")
        for device in host.devices:
            if (other := owner.setdefault(device.id, host.host_id)) != host.host_id:
                raise BadCluster(f"device {device.id} is on {other} and on {host.host_id}")


def records_of(cluster: ClusterTopology) -> Mapping[str, GpuRecord]:
    """Return what is known of each GPU, by its UUID."""
    return {gpu.uuid: gpu for host in cluster.hosts for gpu in host.gpus}
