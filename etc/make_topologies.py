"""Writes ``etc/topologies``: snapshots of well-known machines from their published figures.

    .venv/bin/python etc/make_topologies.py

The files are data and may be read without this program; it keeps their figures in one place.
"""

import uuid
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Final

from topology.gpu import GpuRecord, MigMode, PcieInterface, device_of
from topology.link import P2P, Link, LinkKind
from topology.link_figures import nvlink, pcie_link
from topology.snapshot import to_json
from topology.states import DriverState, DriverStatus, Health, HealthState
from topology.topology import HostTopology, pair_key
from topology.units import MIB

FOLDER: Final = Path(__file__).with_name("topologies")
RATES: Final = (
    "Share of the published rate that a copy gets, and latencies: measured by others, see topology/link_figures.py"
)
PCIE_4: Final = "PCI Express Base Specification 4.0: 16 GT/s per lane, x16 = 31.5 GB/s one way after encoding"
PCIE_5: Final = "PCI Express Base Specification 5.0: 32 GT/s per lane, x16 = 63.0 GB/s one way after encoding"


def machine(
    host_id: str,
    title: str,
    sources: tuple[str, ...],
    *,
    product: str,
    memory_mib: int,
    capability: tuple[int, int],
    pcie_generation: int,
    buses: tuple[str, ...],
    node_of: Callable[[int], int],
    link_of: Callable[[int, int], Link],
) -> HostTopology:
    """Return a machine of one kind of GPU, empty and healthy. UUIDs are made up, the same every time."""
    gpus = tuple(
        GpuRecord(
            uuid=f"GPU-{uuid.uuid5(uuid.NAMESPACE_URL, f'flexpiped/{host_id}/{index}')}",
            pci_bus_id=bus,
            name=product,
            memory_total_bytes=memory_mib * MIB,
            compute_capability=capability,
            numa_node=node_of(index),
            mig_mode=MigMode.DISABLED if capability in ((8, 0), (9, 0)) else MigMode.UNSUPPORTED,
            pcie=PcieInterface(
                max_generation=pcie_generation,
                max_width=16,
                current_generation=pcie_generation,
                current_width=16,
            ),
            health=Health(state=HealthState.OK),
        )
        for index, bus in enumerate(buses)
    )
    return HostTopology(
        host_id=host_id,
        title=title,
        sources=(*sources, RATES),
        driver=DriverStatus(state=DriverState.OK),
        devices=tuple(device_of(gpu, host_id=host_id) for gpu in gpus),
        gpus=gpus,
        links={pair_key(gpus[a].uuid, gpus[b].uuid): link_of(a, b) for a, b in combinations(range(len(gpus)), 2)},
    )


def hgx(host_id: str, title: str, sources: tuple[str, ...], *, product: str, memory_mib: int) -> HostTopology:
    """Return eight SXM5 GPUs, each with 18 lanes of NVLink 4 into four NVSwitches."""
    return machine(
        host_id,
        title,
        (
            *sources,
            "NVLink 4: 18 lanes of 25 GB/s one way = 450 GB/s (900 GB/s both ways) between any two GPUs",
            PCIE_5,
        ),
        product=product,
        memory_mib=memory_mib,
        capability=(9, 0),
        pcie_generation=5,
        buses=tuple(f"0000:{bus}:00.0" for bus in ("1b", "43", "52", "61", "9d", "c3", "d1", "df")),
        node_of=lambda index: index // 4,
        link_of=lambda _a, _b: nvlink(version=4, lanes=18, through_switch=True, p2p=P2P.OK),
    )


def machines() -> tuple[HostTopology, ...]:
    """Return every machine."""
    return (
        hgx(
            "dgx-h100",
            "NVIDIA DGX H100: 8 H100 SXM5 80 GB, 4 NVSwitches",
            ("NVIDIA DGX H100 data sheet", "NVIDIA DGX H100/H200 User Guide, hardware overview"),
            product="NVIDIA H100 80GB HBM3",
            memory_mib=81_559,
        ),
        hgx(
            "hgx-h200",
            "NVIDIA HGX H200: 8 H200 SXM5 141 GB, 4 NVSwitches",
            ("NVIDIA H200 Tensor Core GPU data sheet", "NVIDIA HGX platform page"),
            product="NVIDIA H200",
            memory_mib=143_771,
        ),
        machine(
            "8xl40s-pcie",
            "8 L40S in two PCIe switches of four, one per socket",
            ("NVIDIA L40S data sheet (PCIe 4.0 x16, no NVLink)", PCIE_4),
            product="NVIDIA L40S",
            memory_mib=46_068,
            capability=(8, 9),
            pcie_generation=4,
            buses=tuple(f"0000:{bus}:00.0" for bus in ("34", "35", "36", "37", "b4", "b5", "b6", "b7")),
            node_of=lambda index: index // 4,
            link_of=lambda a, b: pcie_link(
                LinkKind.PIX if a // 4 == b // 4 else LinkKind.SYS, generation=4, width=16, p2p=P2P.OK
            ),
        ),
        machine(
            "2xa10-workstation",
            "2 A10 at two root ports of one socket",
            ("NVIDIA A10 data sheet (PCIe 4.0 x16, no NVLink)", PCIE_4),
            product="NVIDIA A10",
            memory_mib=23_028,
            capability=(8, 6),
            pcie_generation=4,
            buses=("0000:01:00.0", "0000:41:00.0"),
            node_of=lambda _index: 0,
            link_of=lambda _a, _b: pcie_link(LinkKind.PHB, generation=4, width=16, p2p=P2P.OK),
        ),
    )


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for host in machines():
        (FOLDER / f"{host.host_id}.json").write_text(to_json(host), encoding="utf-8")
