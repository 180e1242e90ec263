"""``flexctl topology``: what is written, and that it fits."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from flexpiped.flexctl.topology_lines import labels_of, rate, topology_lines
from tests.support.fake_nvml import discovered
from topology.cluster import merge
from topology.device import cpu_devices
from topology.link import Link, LinkKind
from topology.link_figures import shared_memory_link
from topology.machines import as_host, load_topology, machine_names
from topology.topology import HostTopology


def machine(name: str) -> HostTopology:
    found = load_topology(name)
    assert isinstance(found, HostTopology)
    return found


def text(host: HostTopology) -> str:
    return "\n".join(topology_lines(host))


@pytest.mark.parametrize("name", machine_names())
def test_machines_fit_into_eighty_columns(name: str) -> None:
    lines = topology_lines(machine(name))

    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"{name}   ")


def test_the_matrix_that_users_of_nvidia_smi_know() -> None:
    lines = topology_lines(machine("8xl40s-pcie"))

    assert lines[3] == "      GPU0   GPU1   GPU2   GPU3   GPU4   GPU5   GPU6   GPU7"
    assert lines[4] == " GPU0 -      PIX 27 PIX 27 PIX 27 SYS 22 SYS 22 SYS 22 SYS 22"
    assert " GPU4   b4:00.0 1    45 of 45 GiB GPU-537532eb-5444-5888-a709-6522bc56bba4" in lines
    assert "  PIX   at most one PCIe bridge; 4.1 us, 4.0 x16" in lines
    assert "  GB/s one way, as published rates give it" in lines


def test_wide_hosts_are_shown_in_blocks(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=16, wires="nvswitch")

    lines = topology_lines(host)

    heads = [line.split() for line in lines if line.strip().startswith("GPU") and "NV" not in line and ":" not in line]
    assert max(map(len, lines)) <= 80
    assert [label for head in heads for label in head] == [f"GPU{index}" for index in range(16)]
    assert sum(line.startswith(" GPU0 ") and "NV18" in line for line in lines) == len(heads) == 2
    assert max(map(len, topology_lines(host, width=160))) > 120


def test_what_others_hold_and_what_is_wrong_is_said(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=4, held="0:7:300,1:0:900", lost=2, ecc=3)

    shown = text(host)

    assert "GPU0: others hold 300 MiB: program-7 (pid 7, 300 MiB)" in shown
    assert "GPU1: others hold 902 MiB (processes that this user or container may not see)" in " ".join(shown.split())
    assert "GPU2 0000:12:00.0 GPU-00002222-0000-0000-0000-000000000002: lost: it fell" in shown
    assert "GPU3: 2 uncorrected memory errors" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_instances_are_named_after_their_gpu(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=2, mig=1)

    assert list(labels_of(host).values()) == ["GPU0", "GPU1", "GPU1M0", "GPU1M1", "GPU1M2"]
    assert "GPU1 is divided into MIG instances: work goes to them" in text(host)
    assert "no P2P" in text(host)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"with_library": False}, "no GPUs: no NVIDIA driver on this host (libnvidia-ml.so.1 not found)"),
        ({"define": "OLD_DRIVER"}, "driver: driver 580.00-fake is old: it lacks nvmlDevice"),
        ({"count": 2, "denied": 1}, "GPU 1 in the driver's list: no permission"),
    ],
)
def test_the_driver_s_state_is_said(tmp_path: Path, variables: dict[str, object], sentence: str) -> None:
    host, _ = discovered(sysfs=tmp_path, **variables)  # type: ignore[arg-type]

    shown = text(host)
    assert sentence in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def cpu_host(count: int, **links: Link) -> HostTopology:
    pairs = {tuple(name.split("_")): link for name, link in links.items()}
    joined = {(f"cpu:{a}", f"cpu:{b}"): link for (a, b), link in pairs.items()}
    return HostTopology(host_id="h", devices=cpu_devices(count=count, memory_bytes=1 << 29, threads=1), links=joined)


def test_measured_links_are_marked() -> None:
    fast = Link(kind=LinkKind.SHARED_MEMORY, bandwidth_bytes_per_s=7e9, latency_s=3e-5, is_measured=True)
    one = cpu_host(3)
    ids = [device.id for device in one.devices]

    some = text(replace(one, links={("cpu:0", "cpu:1"): fast}))
    every = text(replace(one, links=dict.fromkeys(combinations(ids, 2), fast)))

    assert " cpu:0 -        SHM 7.0* SHM 3.9" in some
    assert "GB/s one way; * measured, else as published rates give it" in some
    assert " cpu:0 -       SHM 7.0 SHM 7.0" in every
    assert "GB/s one way, measured on these devices" in every
    assert "cpu:0 to cpu:2: 1 thread, 512 of 512 MiB free each" in every


def test_very_many_devices_that_are_alike_are_one_line() -> None:
    shown = text(cpu_host(100))

    assert "every pair of the 100 devices: SHM 3.9 GB/s" in shown
    assert len(shown.splitlines()) < 10


def test_one_device_has_no_matrix() -> None:
    assert "GB/s" not in text(cpu_host(1))
    assert text(HostTopology(host_id="", devices=())).startswith("this host   no devices")


def test_a_cluster_shows_its_hosts_and_each_kind_of_wiring_once() -> None:
    l40s, a10 = machine("8xl40s-pcie"), machine("2xa10-workstation")
    cluster = merge([as_host(l40s, "a", rack="1"), as_host(l40s, "b", rack="1"), as_host(a10, "c", rack="2")])

    lines = topology_lines(cluster)

    assert lines[0] == "3 hosts in 2 racks   18 devices"
    assert any(line.split() == ["b", "1", "8", "x", "L40S", "360", "of", "360", "GiB", "0"] for line in lines)
    assert [line for line in lines if line.startswith("links of")] == [
        "links of a, and of hosts like it",
        "links of c, and of hosts like it",
    ]
    assert max(map(len, lines)) <= 80


def test_rates_have_two_or_three_digits() -> None:
    assert [rate(value * 1e9) for value in (373.5, 27.1, 9.96, 5.37, 0.994, 0.31)] == [
        "374",
        "27",
        "10",
        "5.4",
        "0.99",
        "0.31",
    ]
    assert rate(shared_memory_link().bandwidth_bytes_per_s) == "3.9"
