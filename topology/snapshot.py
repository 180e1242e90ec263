"""Topologies as JSON files: what discovery saw, so that a planner's problem can be replayed anywhere.

A file is one host (``"format": "flexpiped-host"``) or a cluster of them (``"flexpiped-cluster"``), with a version.
Values that are as their default are left out. Reading is strict: what is missing, misspelt or impossible is named by
its place.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from topology.cluster import ClusterTopology, Network, merge
from topology.device import Device
from topology.errors import BadCluster, BadSnapshot
from topology.gpu import GpuRecord
from topology.link import Link
from topology.states import DriverStatus
from topology.topology import HostTopology, PairKey, pair_key

T = TypeVar("T")
HOST_FORMAT: Final = "flexpiped-host"
CLUSTER_FORMAT: Final = "flexpiped-cluster"
VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wire:
    """A link with the two that it joins."""

    a: str
    b: str
    link: Link


@dataclass(frozen=True, slots=True, kw_only=True)
class _Host:
    host_id: str
    devices: tuple[Device, ...]
    title: str = ""
    rack: str = ""
    sources: tuple[str, ...] = ()
    driver: DriverStatus = field(default_factory=DriverStatus)
    gpus: tuple[GpuRecord, ...] = ()
    links: tuple[_Wire, ...] = ()


_SAME_IN_BOTH: Final = tuple(each.name for each in fields(_Host) if each.name != "links")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Network:
    within_rack: Link
    between_racks: Link
    links: tuple[_Wire, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cluster:
    network: _Network
    hosts: tuple[_Host, ...]


def to_json(topology: HostTopology | ClusterTopology) -> str:
    """Return the text of a snapshot: one device, GPU or link a line."""
    if isinstance(topology, ClusterTopology):
        network = topology.network
        links = _wires(network.links)
        wire = _Network(within_rack=network.within_rack, between_racks=network.between_racks, links=links)
        cluster = _Cluster(network=wire, hosts=tuple(map(_host, topology.hosts)))
        return _text({"format": CLUSTER_FORMAT, "version": VERSION} | _plain(cluster))
    return _text({"format": HOST_FORMAT, "version": VERSION} | _plain(_host(topology)))


def from_json(text: str | bytes, *, file: str = "snapshot") -> HostTopology | ClusterTopology:
    """Read a snapshot.

    Args:
        file: Named in errors.

    Raises:
        BadSnapshot: Not JSON, of another format or version, or a value is missing, unknown or impossible.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise BadSnapshot(f"{file}: not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") not in (HOST_FORMAT, CLUSTER_FORMAT):
        raise BadSnapshot(f'{file}: "format" must be "{HOST_FORMAT}" or "{CLUSTER_FORMAT}"')
    if raw.get("version") != VERSION:
        raise BadSnapshot(f"{file}: version {raw.get('version')}; this flexpiped reads version {VERSION}")
    content = {key: value for key, value in raw.items() if key not in ("format", "version")}
    if raw["format"] == HOST_FORMAT:
        return _topology(_decode(content, _Host, file), file)
    return _cluster(_decode(content, _Cluster, file), file)


def read_snapshot(path: Path) -> HostTopology | ClusterTopology:
    """Read a snapshot file. Raises ``BadSnapshot``, also where there is no such file."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadSnapshot(f"{path}: {error.strerror}") from None
    return from_json(text, file=str(path))


def _host(host: HostTopology) -> _Host:
    return _Host(**{name: getattr(host, name) for name in _SAME_IN_BOTH}, links=_wires(host.links))


def _wires(links: Mapping[PairKey, Link]) -> tuple[_Wire, ...]:
    return tuple(_Wire(a=a, b=b, link=link) for (a, b), link in links.items())


def _topology(host: _Host, file: str) -> HostTopology:
    try:
        return HostTopology(**{name: getattr(host, name) for name in _SAME_IN_BOTH}, links=_links(host.links))
    except ValueError as error:
        raise BadSnapshot(f"{file}: {error}") from None


def _cluster(cluster: _Cluster, file: str) -> ClusterTopology:
    network = Network(
        within_rack=cluster.network.within_rack,
        between_racks=cluster.network.between_racks,
        links=_links(cluster.network.links),
    )
    try:
        return merge([_topology(host, file) for host in cluster.hosts], network=network)
    except BadCluster as error:
        raise BadSnapshot(f"{file}: {error}") from None


def _links(wires: Sequence[_Wire]) -> dict[PairKey, Link]:
    return {pair_key(wire.a, wire.b): wire.link for wire in wires}


def _decode(raw: object, kind: type[T], file: str) -> T:
    """Return ``raw`` as ``kind``; msgspec names the place of what is wrong, but lets unknown names pass."""
    try:
        value = msgspec.convert(raw, type=kind)
    except msgspec.ValidationError as error:
        raise BadSnapshot(f"{file}: {error}") from None
    if (place := _unknown(raw, value, "$")) is not None:
        raise BadSnapshot(f"{file}: unknown name - at `{place}`")
    return value


def _unknown(raw: object, value: object, place: str) -> str | None:
    """Return the place of the first name in ``raw`` that ``value`` has no field for."""
    if isinstance(raw, dict) and is_dataclass(value):
        known = {each.name for each in fields(value)}
        for name, part in raw.items():
            if name not in known:
                return f"{place}.{name}"
            if (found := _unknown(part, getattr(value, name), f"{place}.{name}")) is not None:
                return found
    if isinstance(raw, list) and isinstance(value, tuple):
        for index, (part, parsed) in enumerate(zip(raw, value, strict=True)):
            if (found := _unknown(part, parsed, f"{place}[{index}]")) is not None:
                return found
    return None


def _plain(value: Any) -> Any:
    """Return a dataclass as JSON values, without the fields that are as their default."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            each.name: _plain(here) for each in fields(value) if (here := getattr(value, each.name)) != _default(each)
        }
    if isinstance(value, Enum):
        return value.value
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _default(of: Any) -> object:
    return of.default if of.default_factory is MISSING else of.default_factory()


def _text(document: Mapping[str, Any], indent: str = "") -> str:
    """Return JSON with one element of a list a line, and a host of a cluster written likewise."""
    inner = indent + " "
    lines = [f"{inner}{json.dumps(name)}: {_value(value, inner)}" for name, value in document.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}" + ("" if indent else "\n")


def _value(value: Any, indent: str) -> str:
    if isinstance(value, list) and value:
        inner = indent + " "
        rows = [_text(row, inner) if _is_host(row) else json.dumps(row) for row in value]
        return "[\n" + ",\n".join(inner + row for row in rows) + f"\n{indent}]"
    return json.dumps(value)


def _is_host(row: object) -> bool:
    return isinstance(row, dict) and "host_id" in row and "devices" in row
