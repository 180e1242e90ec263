"""The view of one host and of many: links in constant time, defaults, ids that are unique in a cluster."""

from dataclasses import replace

import pytest

from topology.cluster import ClusterTopology, Network, merge
from topology.device import Device, DeviceKind, cpu_devices
from topology.errors import BadCluster, UnknownDevice
from topology.link import P2P, Link, LinkKind, nearness
from topology.link_figures import network_link, nvlink, pcie_link, shared_memory_link
from topology.topology import HostTopology, pair_key, pairs
from topology.units import GIB


def gpu(name: str) -> Device:
    return Device(id=name, kind=DeviceKind.CUDA, memory_total_bytes=80 * GIB, name="NVIDIA H100 80GB HBM3")


def gpu_host(host_id: str, *, rack: str = "", count: int = 2) -> HostTopology:
    devices = tuple(gpu(f"GPU-{host_id}-{index}") for index in range(count))
    wired = {pair_key(devices[0].id, devices[1].id): nvlink(version=4, lanes=18, through_switch=True)}
    return HostTopology(host_id=host_id, rack=rack, devices=devices, links=wired)


def cpu_host(host_id: str, *, count: int = 2) -> HostTopology:
    return HostTopology(host_id=host_id, devices=cpu_devices(count=count, memory_bytes=GIB))


def test_a_link_is_the_same_both_ways() -> None:
    host = gpu_host("a")

    assert host.link("GPU-a-0", "GPU-a-1") is host.link("GPU-a-1", "GPU-a-0")
    assert host.link("GPU-a-0", "GPU-a-1").kind is LinkKind.NVSWITCH


def test_what_is_not_named_has_a_default() -> None:
    mixed = HostTopology(host_id="a", devices=(gpu("G0"), gpu("G1"), *cpu_devices(count=2, memory_bytes=GIB)))

    kinds = {(a.id, b.id): link.kind for a, b, link in pairs(mixed)}

    assert kinds[("G0", "G1")] is LinkKind.SYS
    assert kinds[("G0", "cpu:0")] is LinkKind.PHB
    assert kinds[("cpu:0", "cpu:1")] is LinkKind.SHARED_MEMORY


def test_a_device_is_joined_to_itself_by_its_memory() -> None:
    host = HostTopology(host_id="", devices=(gpu("G0"), Device(id="X", kind=DeviceKind.CUDA, memory_total_bytes=1)))

    assert host.link("G0", "G0").kind is LinkKind.SAME_DEVICE
    assert host.link("G0", "G0").bandwidth_bytes_per_s == 3350e9 / 2
    assert host.link("X", "X").kind is LinkKind.SAME_DEVICE


@pytest.mark.parametrize("pair", [("G0", "G9"), ("G9", "G9"), ("G9", "G0")])
def test_a_device_that_is_not_there_is_named(pair: tuple[str, str]) -> None:
    host = HostTopology(host_id="a", devices=(gpu("G0"),))

    with pytest.raises(UnknownDevice, match="G9"):
        host.link(*pair)
    with pytest.raises(UnknownDevice, match="G9"):
        merge([host]).link(*pair)


def test_links_join_devices_that_are_there() -> None:
    link = shared_memory_link()
    for wrong in [("cpu:1", "cpu:0"), ("cpu:0", "cpu:9"), ("cpu:0", "cpu:0")]:
        with pytest.raises(ValueError, match="link joins"):
            HostTopology(host_id="", devices=cpu_devices(count=2, memory_bytes=1), links={wrong: link})
    with pytest.raises(ValueError, match="same id"):
        HostTopology(host_id="", devices=(gpu("G0"), gpu("G0")))


def test_the_network_joins_hosts_by_rack() -> None:
    slow, fast, special = (network_link(bits_per_s=rate * 1e9) for rate in (10, 100, 400))
    network = Network(within_rack=fast, between_racks=slow, links={pair_key("a", "c"): special})
    cluster = merge([gpu_host("a", rack="1"), gpu_host("b", rack="1"), gpu_host("c", rack="2")], network=network)

    assert cluster.link("GPU-a-0", "GPU-b-0") is fast
    assert cluster.link("GPU-b-0", "GPU-c-1") is slow
    assert cluster.link("GPU-c-1", "GPU-a-0") is special
    assert cluster.link("GPU-b-0", "GPU-b-1").kind is LinkKind.NVSWITCH
    assert [device.host_id for device in cluster.devices] == ["a", "a", "b", "b", "c", "c"]


def test_cpu_devices_of_two_hosts_are_told_apart() -> None:
    wired = {("cpu:0", "cpu:1"): Link(kind=LinkKind.SHARED_MEMORY, bandwidth_bytes_per_s=7, latency_s=0)}
    cluster = merge([replace(cpu_host("a"), links=wired), cpu_host("b")])

    assert [device.id for device in cluster.devices] == ["a/cpu:0", "a/cpu:1", "b/cpu:0", "b/cpu:1"]
    assert cluster.link("a/cpu:1", "a/cpu:0").bandwidth_bytes_per_s == 7
    assert cluster.link("a/cpu:1", "b/cpu:0").kind is LinkKind.NETWORK
    assert merge(cluster.hosts) == cluster


def test_hosts_come_change_and_leave() -> None:
    cluster = merge([cpu_host("a"), cpu_host("b")])

    bigger = cluster.with_host(cpu_host("b", count=3)).with_host(cpu_host("c"))
    smaller = bigger.without_host("a").without_host("nobody")

    assert [len(host.devices) for host in bigger.hosts] == [2, 3, 2]
    assert [host.host_id for host in smaller.hosts] == ["b", "c"]
    assert cluster == merge([cpu_host("a"), cpu_host("b")])


def test_racks_can_be_told_from_outside() -> None:
    cluster = merge([cpu_host("a"), cpu_host("b")], racks={"b": "far"})

    assert [host.rack for host in cluster.hosts] == ["", "far"]


@pytest.mark.parametrize(
    ("hosts", "reason"),
    [
        ([cpu_host("a"), cpu_host("a")], "two hosts are called a"),
        ([gpu_host("a"), replace(gpu_host("a"), host_id="b")], "GPU-a-0 is on a and on b"),
        ([cpu_host("")], "no id"),
    ],
)
def test_hosts_that_cannot_be_one_cluster(hosts: list[HostTopology], reason: str) -> None:
    with pytest.raises(BadCluster, match=reason):
        merge(hosts)


def test_the_network_names_hosts_that_are_there() -> None:
    with pytest.raises(BadCluster, match="not here: z"):
        ClusterTopology(hosts=(), network=Network(links={("z", "z2"): network_link(bits_per_s=1)}))


def test_nearer_and_faster_links_come_first() -> None:
    links = [
        shared_memory_link(),
        pcie_link(LinkKind.SYS, generation=4, width=16),
        pcie_link(LinkKind.PIX, generation=4, width=8),
        pcie_link(LinkKind.PIX, generation=4, width=16),
        nvlink(version=4, lanes=4, through_switch=False),
    ]

    assert sorted(links, key=nearness) == links[:0:-1] + links[:1]


def test_figures_of_links() -> None:
    assert nvlink(version=4, lanes=18, through_switch=True).peak_bytes_per_s == 450e9
    assert pcie_link(LinkKind.PIX, generation=5, width=16).peak_bytes_per_s == pytest.approx(63e9, rel=0.001)
    assert pcie_link(LinkKind.PIX, generation=3, width=8).peak_bytes_per_s == pytest.approx(7.88e9, rel=0.001)
    direct = pcie_link(LinkKind.PIX, generation=4, width=16, p2p=P2P.OK)
    staged = pcie_link(LinkKind.PIX, generation=4, width=16, p2p=P2P.CHIPSET_NOT_SUPPORTED)
    assert staged.bandwidth_bytes_per_s < direct.bandwidth_bytes_per_s
    assert staged.latency_s > direct.latency_s
    assert direct.seconds_for(direct.bandwidth_bytes_per_s) == 1 + direct.latency_s


@pytest.mark.parametrize(
    "wrong",
    [
        {"bandwidth_bytes_per_s": 0},
        {"bandwidth_bytes_per_s": float("inf")},
        {"bandwidth_bytes_per_s": float("nan")},
        {"latency_s": -1},
        {"lanes": -1},
        {"peak_bytes_per_s": -1},
    ],
)
def test_impossible_links_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="pix"):
        replace(Link(kind=LinkKind.PIX, bandwidth_bytes_per_s=1, latency_s=0), **wrong)  # type: ignore[arg-type]
