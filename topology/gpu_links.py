"""What joins the GPUs of a host: NVLink where lanes meet, else the PCIe path, with what NVML says about P2P."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Final

from topology.gpu import GpuRecord, RemoteEnd
from topology.gpu_discovery import FoundGpu
from topology.link import P2P, Link, LinkKind
from topology.link_figures import nvlink, pcie_link
from topology.nvml import Nvml, Refusal
from topology.pcie import PciTree
from topology.topology import PairKey, pair_key

_LEVELS: Final = {
    0: LinkKind.PIX,  # two GPUs of one board
    10: LinkKind.PIX,
    20: LinkKind.PXB,
    30: LinkKind.PHB,
    40: LinkKind.NODE,
    50: LinkKind.SYS,
}
_P2P_STATUSES: Final = {
    0: P2P.OK,
    1: P2P.CHIPSET_NOT_SUPPORTED,
    2: P2P.GPU_NOT_SUPPORTED,
    3: P2P.TOPOLOGY_NOT_SUPPORTED,
    4: P2P.DISABLED_BY_REGISTRY,
    5: P2P.NOT_SUPPORTED,
}
_READ, _WRITE, _NVLINK = 0, 1, 2  # NVML's capabilities
# Generation by the major number of the compute capability, where the driver does not say it of a lane.
_GENERATION_OF_MAJOR: Final = {6: 1, 7: 2, 8: 3, 9: 4, 10: 5, 12: 5}


def find_links(session: Nvml, gpus: Sequence[FoundGpu], *, tree: PciTree) -> Mapping[PairKey, Link]:
    """Return the link of every pair of GPUs and MIG instances, by ``pair_key`` of their UUIDs."""
    handles = {each.record.uuid: each for each in gpus if not each.record.is_mig_instance}
    return {
        pair_key(a.record.uuid, b.record.uuid): _link(session, a, b, parents=handles, tree=tree)
        for a, b in combinations(gpus, 2)
    }


def _link(session: Nvml, a: FoundGpu, b: FoundGpu, *, parents: Mapping[str, FoundGpu], tree: PciTree) -> Link:
    """Instances have no P2P, over NVLink or PCIe (NVIDIA MIG user guide): the host stages each copy."""
    a_whole, b_whole = parents.get(a.record.parent_uuid, a), parents.get(b.record.parent_uuid, b)
    if a.record.is_mig_instance or b.record.is_mig_instance:
        return _pcie(session, a_whole, b_whole, tree=tree, p2p=P2P.GPU_NOT_SUPPORTED)
    if (lanes := _shared_lanes(a.record, b.record)) is not None:
        status = _p2p(session, a, b, _NVLINK)
        if not status.is_refused:  # else the lanes are up but not in use: the fabric manager does not run
            count, through_switch = lanes
            return nvlink(
                version=_generation(a.record),
                lanes=count,
                through_switch=through_switch,
                half_rate=a.record.compute_capability == (8, 6),
                p2p=status,
            )
    return _pcie(session, a, b, tree=tree, p2p=max(_p2p(session, a, b, _READ), _p2p(session, a, b, _WRITE), key=_worst))


def _shared_lanes(a: GpuRecord, b: GpuRecord) -> tuple[int, bool] | None:
    """Return how many lanes join two GPUs and whether through switches: direct ones first."""
    direct = sum(lane.remote_bus_id == b.pci_bus_id for lane in a.nvlink_lanes if lane.remote is not RemoteEnd.SWITCH)
    if direct:
        return direct, False
    switched = min(sum(lane.remote is RemoteEnd.SWITCH for lane in record.nvlink_lanes) for record in (a, b))
    return (switched, True) if switched else None


def _generation(record: GpuRecord) -> int:
    if said := max((lane.version for lane in record.nvlink_lanes), default=0):
        return said
    return _GENERATION_OF_MAJOR.get(record.compute_capability[0], 0) if record.compute_capability else 0


def _pcie(session: Nvml, a: FoundGpu, b: FoundGpu, *, tree: PciTree, p2p: P2P) -> Link:
    """Kind as NVML says, else from sysfs; generation and width from sysfs, else of the two GPUs' own ports."""
    path = tree.path(a.record.pci_bus_id, b.record.pci_bus_id)
    level = 0 if a is b else session.common_ancestor(a.handle, b.handle)
    kind = None if isinstance(level, Refusal) else _LEVELS.get(level)
    if kind is None:
        kind = LinkKind.SYS if path is None else path.kind
    return pcie_link(
        kind,
        generation=_least(path.generation if path else 0, a.record.pcie.max_generation, b.record.pcie.max_generation),
        width=_least(path.width if path else 0, a.record.pcie.max_width, b.record.pcie.max_width),
        p2p=p2p,
    )


def _p2p(session: Nvml, a: FoundGpu, b: FoundGpu, capability: int) -> P2P:
    status = session.p2p_status(a.handle, b.handle, capability)
    return P2P.UNKNOWN if isinstance(status, Refusal) else _P2P_STATUSES.get(status, P2P.UNKNOWN)


def _worst(status: P2P) -> int:
    return 2 if status.is_refused else 1 if status is P2P.UNKNOWN else 0


def _least(*figures: int) -> int:
    return min((figure for figure in figures if figure), default=0)
