"""Snapshots: what is written is read back, and what is wrong in a file is named by its place."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.cluster import ClusterTopology, Network, merge
from topology.device import Device, DeviceKind
from topology.errors import BadSnapshot
from topology.gpu import GpuProcess, GpuRecord, NvLinkLane, PcieInterface, RemoteEnd
from topology.link import Link
from topology.snapshot import from_json, read_snapshot, to_json
from topology.states import DriverState, DriverStatus, Health
from topology.topology import HostTopology, pair_key

GOOD = {
    "format": "flexpiped-host",
    "version": 1,
    "host_id": "h",
    "devices": [
        {"id": "G0", "kind": "cuda", "memory_total_bytes": 10},
        {"id": "G1", "kind": "cuda", "memory_total_bytes": 10},
    ],
    "links": [{"a": "G1", "b": "G0", "link": {"kind": "pix", "bandwidth_bytes_per_s": 5, "latency_s": 0}}],
}

names = st.text(min_size=1, max_size=8)
counts = st.integers(0, 2**40)
rates = st.floats(1, 1e15, allow_nan=False)
links = st.builds(
    Link, bandwidth_bytes_per_s=rates, latency_s=st.floats(0, 1), lanes=st.integers(0, 18), generation=st.integers(0, 6)
)
healths = st.builds(Health, ecc_uncorrected=st.none() | counts, is_retirement_pending=st.none() | st.booleans())
records = st.builds(
    GpuRecord,
    uuid=names,
    pci_bus_id=names,
    name=names,
    memory_total_bytes=counts,
    processes=st.lists(st.builds(GpuProcess, pid=st.integers(1, 99), name=names, used_bytes=st.none() | counts)).map(
        tuple
    ),
    compute_capability=st.none() | st.tuples(st.integers(5, 12), st.integers(0, 9)),
    utilisation=st.none() | st.floats(0, 1),
    cpu_affinity=st.lists(st.integers(0, 500), max_size=3).map(tuple),
    pcie=st.builds(PcieInterface, max_generation=st.integers(0, 6)),
    nvlink_lanes=st.lists(
        st.builds(NvLinkLane, lane=st.integers(0, 17), version=st.integers(0, 5), remote=st.sampled_from(RemoteEnd)),
        max_size=2,
    ).map(tuple),
    health=healths,
)
drivers = st.builds(DriverStatus, state=st.sampled_from(DriverState), missing=st.lists(names, max_size=2).map(tuple))


@st.composite
def hosts(draw: st.DrawFn, host_id: str = "h") -> HostTopology:
    ids = draw(st.lists(st.integers(0, 99), unique=True, max_size=4))
    devices = tuple(
        Device(
            id=f"{host_id}-{number}",
            kind=DeviceKind.CUDA,
            memory_total_bytes=1000,
            memory_reserved_bytes=draw(st.integers(0, 1000)),
            name=draw(names),
            host_id=host_id,
            numa_node=draw(st.none() | st.integers(0, 7)),
        )
        for number in ids
    )
    joined = {
        pair_key(a.id, b.id): draw(links) for a in devices for b in devices if a.id < b.id and draw(st.booleans())
    }
    return HostTopology(
        host_id=host_id,
        devices=devices,
        links=joined,
        gpus=tuple(draw(st.lists(records, max_size=2))),
        driver=draw(drivers),
        rack=draw(st.text(max_size=4)),
        title=draw(st.text(max_size=4)),
        sources=tuple(draw(st.lists(names, max_size=2))),
    )


@settings(deadline=None)  # a busy machine is no failure
@given(hosts())
def test_a_host_is_read_back_as_it_was(host: HostTopology) -> None:
    assert from_json(to_json(host)) == host


@settings(deadline=None)  # a busy machine is no failure
@given(hosts(host_id="a"), hosts(host_id="b"), links, links, st.booleans())
def test_a_cluster_is_read_back_as_it_was(a: HostTopology, b: HostTopology, near: Link, far: Link, own: bool) -> None:
    network = Network(within_rack=near, between_racks=far, links={("a", "b"): far} if own else {})
    cluster = merge([a, b], network=network)

    assert from_json(to_json(cluster)) == cluster


def test_values_that_are_left_out_have_their_defaults() -> None:
    host = from_json(json.dumps(GOOD))

    assert isinstance(host, HostTopology)
    assert host.link("G0", "G1").bandwidth_bytes_per_s == 5
    assert "memory_reserved_bytes" not in to_json(host)


def changed(path: tuple[str | int, ...], value: object) -> str:
    """Return the good document with one value replaced, or removed where ``value`` is Ellipsis."""
    document = json.loads(json.dumps(GOOD))
    part = document
    for step in path[:-1]:
        part = part[step]
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("format",), "other", r'"format" must be'),
        (("version",), 2, "version 2; this flexpiped reads version 1"),
        (("host_id",), ..., "missing required field `host_id`"),
        (("hostid",), "x", r"unknown name - at `\$\.hostid`"),
        (("devices", 1, "memory_total_bytes"), "10", r"\$\.devices\[1\]\.memory_total_bytes"),
        (("devices", 1, "memory"), 10, r"unknown name - at `\$\.devices\[1\]\.memory`"),
        (("devices", 0, "kind"), "gpu", r"\$\.devices\[0\]\.kind"),
        (("devices", 0, "memory_reserved_bytes"), 99, r"99 of 10 bytes reserved - at `\$\.devices\[0\]`"),
        (("devices", 1, "id"), "G0", "two devices have the same id"),
        (("links", 0, "a"), "G7", "a link joins G0 and G7"),
        (("links", 0, "link", "bandwidth_bytes_per_s"), 0, r"bandwidth of 0.* - at `\$\.links\[0\]\.link`"),
        (("links", 0, "link", "lane"), 0, r"unknown name - at `\$\.links\[0\]\.link\.lane`"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(path: tuple[str | int, ...], value: object, reason: str) -> None:
    with pytest.raises(BadSnapshot, match=reason) as caught:
        from_json(changed(path, value), file="my.json")
    assert str(caught.value).startswith("my.json: ")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1}'])
def test_what_is_no_snapshot(text: str) -> None:
    with pytest.raises(BadSnapshot, match=r"my\.json"):
        from_json(text, file="my.json")


def test_a_cluster_with_a_host_twice_is_refused() -> None:
    host = from_json(json.dumps(GOOD))
    assert isinstance(host, HostTopology)
    cluster = json.loads(to_json(ClusterTopology(hosts=(host, replace(host, host_id="i", devices=(), links={})))))
    cluster["hosts"][1]["host_id"] = "h"

    with pytest.raises(BadSnapshot, match="two hosts are called h"):
        from_json(json.dumps(cluster))


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadSnapshot, match=r"none\.json: No such file"):
        read_snapshot(tmp_path / "none.json")
