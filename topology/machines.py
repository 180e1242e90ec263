"""Snapshots of well-known machines that come with flexpiped, by name: to plan for hardware that is not here."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

from topology.cluster import ClusterTopology
from topology.errors import BadSnapshot
from topology.snapshot import read_snapshot
from topology.topology import HostTopology, pair_key

_PACKAGE_PARENT: Final = Path(__file__).resolve().parents[1]


def machine_places() -> tuple[Path, ...]:
    """Return where they may lie: beside the package in a checkout, else where flexpiped is installed."""
    return (
        _PACKAGE_PARENT / "etc" / "topologies",
        Path(sys.prefix) / "share" / "flexpiped" / "topologies",
        Path("/usr/share/flexpiped/topologies"),
    )


def machine_names() -> tuple[str, ...]:
    """Return the names of the machines, as ``load_topology`` takes them."""
    folder = next((place for place in machine_places() if place.is_dir()), None)
    return () if folder is None else tuple(sorted(file.stem for file in folder.glob("*.json")))


def load_topology(name: str) -> HostTopology | ClusterTopology:
    """Return a topology by the path of its file, or by the name of a machine that comes with flexpiped.

    Raises:
        BadSnapshot: There is neither, or the file cannot be used.
    """
    path = Path(name).expanduser()
    if path.exists():
        return read_snapshot(path)
    for place in machine_places():
        if (file := place / f"{name}.json").is_file():
            return read_snapshot(file)
    raise BadSnapshot(f"{name}: no such file, and no machine of that name; there are: {', '.join(machine_names())}")


def as_host(machine: HostTopology, host_id: str, *, rack: str = "") -> HostTopology:
    """Return a machine as a host of its own: with ids that differ from those of other copies of it."""
    ids = {device.id: f"{host_id}/{device.id}" for device in machine.devices}
    parents = {gpu.uuid: f"{host_id}/{gpu.uuid}" for gpu in machine.gpus}
    return replace(
        machine,
        host_id=host_id,
        rack=rack,
        devices=tuple(replace(each, id=ids[each.id], host_id=host_id) for each in machine.devices),
        links={pair_key(ids[a], ids[b]): link for (a, b), link in machine.links.items()},
        gpus=tuple(
            replace(gpu, uuid=parents[gpu.uuid], parent_uuid=parents.get(gpu.parent_uuid, "")) for gpu in machine.gpus
        ),
    )
