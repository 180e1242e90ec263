"""Discovery against a stand-in for NVML: what is found, and that nothing which is wrong with a host is an exception."""

from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.fake_nvml import discovered
from tests.support.pci_tree import make_pci_tree
from topology.device import DeviceKind
from topology.gpu import MigMode, RemoteEnd
from topology.link import P2P, Link, LinkKind
from topology.states import DriverState, HealthState
from topology.topology import HostTopology, pair_key
from topology.units import GIB, MIB


def link(host: HostTopology, a: int, b: int) -> Link:
    return host.link(host.devices[a].id, host.devices[b].id)


def test_a_gpu_is_known_by_uuid_and_bus_id(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=4)

    assert host.driver.state is DriverState.OK
    assert (host.driver.driver_version, host.driver.cuda_version) == ("580.00-fake", "13.0")
    assert host.devices[1].id == "GPU-00001111-0000-0000-0000-000000000001"
    assert [device.pci_bus_id for device in host.devices] == [f"0000:1{index}:00.0" for index in range(4)]
    assert {device.name for device in host.devices} == {"NVIDIA H100 80GB HBM3"}
    assert {device.host_id for device in host.devices} == {"here"}
    third = host.gpus[3]
    assert third.compute_capability == (9, 0)
    assert (third.utilisation, third.memory_utilisation) == (0.3, 0.05)
    assert (third.numa_node, third.cpu_affinity) == (1, (4, 5, 6, 7))
    assert third.mig_mode is MigMode.DISABLED
    assert (third.pcie.max_generation, third.pcie.max_width, third.pcie.current_generation) == (5, 16, 1)
    assert third.health.state is HealthState.OK


def test_memory_of_others_is_named_and_ours_is_not_counted(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=5, held="0:7:300,0:8:200,1:8:200,2:99:-1,3:0:5000", own_pids=(8,))
    first, ours, hidden, unseen, free = host.gpus

    assert (first.memory_own_bytes, first.memory_others_bytes) == (200 * MIB, 300 * MIB)
    assert [(each.pid, each.name, each.used_bytes) for each in first.processes] == [(7, "program-7", 300 * MIB)]
    assert host.devices[0].memory_others_bytes == 300 * MIB
    assert host.devices[0].memory_reserved_bytes == (512 + 300 + 2) * MIB
    assert (ours.memory_others_bytes, ours.processes, host.devices[1].is_shared) == (0, (), False)
    assert [(each.pid, each.name, each.used_bytes) for each in hidden.processes] == [(99, "", None)]
    assert hidden.memory_others_bytes == 702 * MIB
    assert (unseen.processes, unseen.memory_others_bytes) == ((), 5002 * MIB)
    assert (free.memory_others_bytes, host.devices[4].memory_reserved_bytes) == (0, 514 * MIB)


def test_names_of_processes_come_from_procfs_where_nvml_may_not_say(tmp_path: Path) -> None:
    (tmp_path / "proc/99").mkdir(parents=True)
    (tmp_path / "proc/99/comm").write_text("trainer\n")

    host, _ = discovered(sysfs=tmp_path, count=1, held="0:99:10")

    assert [each.name for each in host.gpus[0].processes] == ["trainer"]


def test_nvlink_joins_pairs_and_pcie_the_rest(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=4, wires="nvlink")

    near, mid, far = link(host, 0, 1), link(host, 0, 2), link(host, 1, 3)

    assert (near.kind, near.lanes, near.generation, near.p2p) == (LinkKind.NVLINK, 4, 4, P2P.OK)
    assert near.peak_bytes_per_s == 100e9
    assert (mid.kind, far.kind) == (LinkKind.SYS, LinkKind.SYS)
    lane = host.gpus[0].nvlink_lanes[0]
    assert (lane.version, lane.remote, lane.remote_bus_id) == (4, RemoteEnd.GPU, "0000:11:00.0")


def test_nvswitch_joins_all(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=8, wires="nvswitch")

    kinds = {(link(host, a, b).kind, link(host, a, b).lanes) for a in range(8) for b in range(a)}

    assert kinds == {(LinkKind.NVSWITCH, 18)}
    assert link(host, 0, 7).peak_bytes_per_s == 450e9
    assert len(host.gpus[0].nvlink_lanes) == 18
    assert host.gpus[0].nvlink_lanes[0].remote is RemoteEnd.SWITCH


def test_lanes_that_are_not_in_use_do_not_count(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=4, wires="nvswitch", fabric="down")

    assert [link(host, 0, other).kind for other in (1, 2, 3)] == [LinkKind.PIX, LinkKind.SYS, LinkKind.SYS]


def test_p2p_that_the_chipset_refuses_costs_bandwidth(tmp_path: Path) -> None:
    direct, _ = discovered(sysfs=tmp_path, count=2)
    staged, _ = discovered(sysfs=tmp_path, count=2, p2p=1)

    assert link(direct, 0, 1).p2p is P2P.OK
    assert link(staged, 0, 1).p2p is P2P.CHIPSET_NOT_SUPPORTED
    assert link(staged, 0, 1).bandwidth_bytes_per_s < link(direct, 0, 1).bandwidth_bytes_per_s


def test_sysfs_says_how_wide_and_fast_a_path_is(tmp_path: Path) -> None:
    paths = {
        "pci0000:00/0000:00:01.0/0000:10:00.0": 0,
        "pci0000:00/0000:00:02.0/0000:11:00.0": 0,
        "pci0000:80/0000:80:01.0/0000:12:00.0": 1,
    }
    root = make_pci_tree(tmp_path, paths, speeds={"0000:00:02.0": ("16.0", 8)})

    by_nvml, _ = discovered(sysfs=root, count=3)
    by_sysfs, _ = discovered(sysfs=root, count=3, topology="none")

    assert [link(by_nvml, 0, other).kind for other in (1, 2)] == [LinkKind.PIX, LinkKind.SYS]
    assert [link(by_sysfs, 0, other).kind for other in (1, 2)] == [LinkKind.PHB, LinkKind.SYS]
    assert (link(by_nvml, 0, 1).generation, link(by_nvml, 0, 1).width) == (4, 8)
    assert (link(by_sysfs, 0, 2).generation, link(by_sysfs, 0, 2).width) == (5, 16)


def test_mig_instances_are_devices_of_their_own(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=2, wires="nvswitch", mig=1, held="1:7:300")

    whole, *instances = host.gpus[1:]
    assert whole.mig_mode is MigMode.ENABLED
    assert whole.uuid not in {device.id for device in host.devices}
    assert [device.id[:4] for device in host.devices] == ["GPU-", "MIG-", "MIG-", "MIG-"]
    assert {instance.parent_uuid for instance in instances} == {whole.uuid}
    assert {instance.pci_bus_id for instance in instances} == {whole.pci_bus_id}
    assert [(each.gpu_instance_id, each.compute_instance_id) for each in instances] == [(1, 0), (2, 0), (2, 1)]
    assert [each.memory_total_bytes // GIB for each in instances] == [40, 20, 20]  # two share one memory
    assert instances[0].memory_others_bytes == 300 * MIB
    assert link(host, 1, 2).kind is LinkKind.PIX
    assert link(host, 0, 1).p2p is P2P.GPU_NOT_SUPPORTED
    assert {each.kind for each in host.devices} == {DeviceKind.CUDA}


def test_a_lost_gpu_keeps_its_identity_and_gets_no_work(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=3, wires="nvswitch", lost=1)

    assert host.gpus[1].health.state is HealthState.LOST
    assert "lost" in host.gpus[1].health.sentence
    assert host.gpus[1].pci_bus_id == "0000:11:00.0"
    assert [device.id for device in host.devices] == [host.gpus[0].uuid, host.gpus[2].uuid]
    assert link(host, 0, 1).kind is LinkKind.NVSWITCH


@pytest.mark.parametrize(("variable", "word"), [("denied", "no permission"), ("gone", "lost")])
def test_a_gpu_without_identity_is_told_and_the_others_work(tmp_path: Path, variable: str, word: str) -> None:
    host, _ = discovered(sysfs=tmp_path, count=3, **{variable: 1})

    assert len(host.devices) == 2
    assert len(host.driver.unreadable) == 1
    assert word in host.driver.unreadable[0]


@pytest.mark.parametrize(
    ("variable", "state", "word"),
    [
        ("ecc", HealthState.DEGRADED, "2 uncorrected memory errors"),
        ("rows", HealthState.DEGRADED, "waits for a reset"),
        ("wants_reset", HealthState.NEEDS_RESET, "wants a reset"),
    ],
)
def test_health_is_a_state_with_a_sentence(tmp_path: Path, variable: str, state: HealthState, word: str) -> None:
    host, _ = discovered(sysfs=tmp_path, count=2, **{variable: 0})

    assert host.gpus[0].health.state is state
    assert word in host.gpus[0].health.sentence
    assert (host.gpus[0].uuid in {device.id for device in host.devices}) is (state is HealthState.DEGRADED)


def test_an_old_driver_leaves_things_out(tmp_path: Path) -> None:
    root = make_pci_tree(tmp_path, {"pci0000:00/0000:00:01.0/0000:10:00.0": 1})

    host, _ = discovered(sysfs=root, count=2, define="OLD_DRIVER", held="0:7:300")

    assert host.driver.state is DriverState.OLD_DRIVER
    assert "580.00-fake is old: it lacks nvmlDevice" in host.driver.sentence
    assert "nvmlDeviceGetNumaNodeId" in host.driver.missing
    assert len(host.devices) == 2
    assert host.gpus[0].memory_reserved_bytes == 0  # it counts as used there
    assert [each.pid for each in host.gpus[0].processes] == [7]
    assert host.gpus[0].numa_node == 1  # from sysfs


@pytest.mark.parametrize(
    ("variables", "state", "word"),
    [
        ({"with_library": False}, DriverState.NO_LIBRARY, "libnvidia-ml.so.1"),
        ({"init": 9}, DriverState.NO_DRIVER, "not loaded"),
        ({"init": 18}, DriverState.VERSION_MISMATCH, "without a reboot"),
        ({"init": 4}, DriverState.NO_PERMISSION, "may not talk"),
        ({"init": 999}, DriverState.FAILED, "the NVIDIA driver said"),
        ({"define": "ANCIENT_DRIVER"}, DriverState.OLD_DRIVER, "too old"),
        ({"count": 0}, DriverState.NO_GPUS, "no GPU"),
    ],
)
def test_without_gpus_there_are_cpu_devices_and_a_reason(
    tmp_path: Path, variables: dict[str, object], state: DriverState, word: str
) -> None:
    host, _ = discovered(sysfs=tmp_path, **variables)  # type: ignore[arg-type]

    assert host.driver.state is state
    assert word in host.driver.sentence
    assert [device.id for device in host.devices] == ["cpu:0", "cpu:1"]
    assert host.link("cpu:0", "cpu:1").kind is LinkKind.SHARED_MEMORY


def test_what_cuda_hides_from_us_is_not_used(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=4, CUDA_VISIBLE_DEVICES="GPU-00002222,0,nonsense,1")

    assert [device.pci_bus_id for device in host.devices] == ["0000:10:00.0", "0000:12:00.0"]
    assert len(host.gpus) == 4
    assert '"nonsense"' in host.driver.notes[0]


def test_sixteen_gpus_all_pairs_in_under_a_fifth_of_a_second(tmp_path: Path) -> None:
    paths = {f"pci0000:00/0000:00:{index:02x}.0/0000:{0x10 + index:02x}:00.0": index // 8 for index in range(16)}
    root = make_pci_tree(tmp_path, paths)

    host, seconds = discovered(sysfs=root, count=16, wires="nvswitch", repeat=3)

    print(f"16 GPUs, 120 pairs: {seconds * 1e3:.1f} ms")
    assert len(host.links) == 120
    assert set(host.links) == {pair_key(a.id, b.id) for a, b in _all_pairs(host)}
    assert seconds < 0.2


def _all_pairs(host: HostTopology) -> list[tuple[object, object]]:
    return [(a, b) for place, a in enumerate(host.devices) for b in host.devices[place + 1 :]]


def test_neighbours_on_one_switch(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=4)

    assert [host.link(a.id, b.id).kind for a, b in pairwise(host.devices)] == [LinkKind.PIX, LinkKind.SYS, LinkKind.PIX]
