"""The machines that come with flexpiped: their published figures, and clusters made of them."""

import runpy
import time
from pathlib import Path

import pytest

from topology.cluster import Network, merge
from topology.errors import BadSnapshot
from topology.gpu_specs import spec_of
from topology.link import LinkKind
from topology.link_figures import network_link
from topology.machines import as_host, load_topology, machine_names
from topology.snapshot import from_json, to_json
from topology.topology import HostTopology, pairs

ETC = Path(__file__).parents[3] / "etc"


def machine(name: str) -> HostTopology:
    found = load_topology(name)
    assert isinstance(found, HostTopology)
    return found


@pytest.mark.parametrize(
    ("name", "count", "kinds", "peak"),
    [
        ("dgx-h100", 8, {LinkKind.NVSWITCH: 28}, 450e9),
        ("hgx-h200", 8, {LinkKind.NVSWITCH: 28}, 450e9),
        ("8xl40s-pcie", 8, {LinkKind.PIX: 12, LinkKind.SYS: 16}, 31.5e9),
        ("2xa10-workstation", 2, {LinkKind.PHB: 1}, 31.5e9),
    ],
)
def test_their_published_figures(name: str, count: int, kinds: dict[LinkKind, int], peak: float) -> None:
    host = machine(name)
    links = [link for _, _, link in pairs(host)]

    assert len(host.devices) == count
    assert {kind: sum(link.kind is kind for link in links) for kind in {link.kind for link in links}} == kinds
    assert [link.peak_bytes_per_s for link in links] == pytest.approx([peak] * len(links), rel=0.001)
    assert all(link.bandwidth_bytes_per_s < link.peak_bytes_per_s for link in links)
    assert all(spec_of(device) is not None for device in host.devices)
    assert len(host.sources) >= 3
    assert host.title


def test_all_are_listed_and_as_their_program_writes_them() -> None:
    written = runpy.run_path(str(ETC / "make_topologies.py"))["machines"]()

    assert machine_names() == tuple(sorted(host.host_id for host in written))
    for host in written:
        assert (ETC / "topologies" / f"{host.host_id}.json").read_text() == to_json(host)


def test_a_name_that_there_is_not_names_those_there_are() -> None:
    with pytest.raises(BadSnapshot, match=r"dgx-h200: no such file.* 2xa10-workstation, 8xl40s-pcie, dgx-h100, hgx"):
        load_topology("dgx-h200")


def paper_cluster() -> tuple[list[str], Network]:
    """Return FlexPipe's: 82 GPUs on 42 hosts, 100 Gb/s; as texts of snapshots."""
    single = machine("2xa10-workstation")
    hosts = [as_host(single, f"host{index}", rack=f"rack{index // 6}") for index in range(42)]
    for index in (40, 41):  # with one GPU each
        kept = hosts[index].devices[:1]
        hosts[index] = HostTopology(host_id=hosts[index].host_id, rack="rack6", devices=kept)
    return [to_json(host) for host in hosts], Network(within_rack=network_link(bits_per_s=100e9))


def test_forty_two_hosts_with_eighty_two_gpus_are_merged_in_under_half_a_second() -> None:
    texts, network = paper_cluster()

    began_s = time.perf_counter()
    hosts = [from_json(text) for text in texts]
    cluster = merge([host for host in hosts if isinstance(host, HostTopology)], network=network)
    found = {cluster.link(a.id, b.id).kind for a in cluster.devices for b in cluster.devices}
    seconds = time.perf_counter() - began_s

    print(f"42 snapshots with 82 GPUs read, merged, all pairs asked: {seconds * 1e3:.1f} ms")
    assert len(cluster.devices) == 82
    assert found == {LinkKind.SAME_DEVICE, LinkKind.PHB, LinkKind.NETWORK}
    assert seconds < 0.5


def test_copies_of_a_machine_are_hosts_of_their_own() -> None:
    dgx = machine("dgx-h100")

    cluster = merge([as_host(dgx, "a"), as_host(dgx, "b")])

    assert len(cluster.devices) == 16
    assert cluster.link("a/" + dgx.devices[0].id, "a/" + dgx.devices[1].id).kind is LinkKind.NVSWITCH
    assert cluster.link("a/" + dgx.devices[0].id, "b/" + dgx.devices[0].id).kind is LinkKind.NETWORK
    assert from_json(to_json(cluster)) == cluster
