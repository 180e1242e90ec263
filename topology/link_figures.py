"""What links carry, by kind, generation and width, where nothing was measured. Measured values take their place.

``peak``: published rate of the wires, one way. ``bandwidth``: what a large copy is known to get of it. ``latency``: a
copy of a few bytes between two GPUs.

Sources:
- NVLink, per lane and direction: NVIDIA's architecture white papers: P100 (NVLink 1, 20 GB/s), V100 (2, 25 GB/s), A100
  (3, 25 GB/s), H100 (4, 25 GB/s), Blackwell (5, 50 GB/s); GA102 (3, four lanes of 112.5 GB/s together, both ways).
- PCIe, per lane and direction after encoding: PCI-SIG, PCI Express Base Specification 1.0 to 6.0 (2.5 to 64 GT/s).
- Share that a copy gets: NVLink 4 through NVSwitch 376 of 450 GB/s (github.com/NVIDIA/nccl, issue 1264); PCIe 5 x16
  54.3 of 63 GB/s below one host bridge (github.com/lukealonso/p2pmark), 39 to 51 GB/s from one NUMA node to another
  (github.com/voipmonitor/rtx6kpro, hardware/pcie-bandwidth.md); without P2P, staged by the host, 37 of 63 GB/s (nccl,
  issue 1264) and 22 of 31.5 GB/s (nccl, issue 814).
- Latency: P2P over NVLink 1.8 to 2.3 us, without P2P 11 to 20 us (github.com/NVIDIA/cuda-samples, issue 230; nccl,
  issue 1127); P2P over PCIe from 4.1 us (p2pmark).
- Shared memory between CPU devices, copied in by one process and out by another: 3.9 GB/s, and 20 us for a few bytes
  with the wake-up of the reader; `flexctl topology --measure` on two cores of a Xeon at 2.8 GHz.
"""

from typing import Final

from topology.link import P2P, Link, LinkKind

_NVLINK_LANE_BYTES_PER_S: Final = {1: 20e9, 2: 25e9, 3: 25e9, 4: 25e9, 5: 50e9}
_HALF_RATE_LANE_BYTES_PER_S: Final = 14.0625e9
_PCIE_LANE_BYTES_PER_S: Final = {
    1: 2.5e9 * 8 / 10 / 8,
    2: 5e9 * 8 / 10 / 8,
    3: 8e9 * 128 / 130 / 8,
    4: 16e9 * 128 / 130 / 8,
    5: 32e9 * 128 / 130 / 8,
    6: 64e9 * 242 / 256 / 8,
}
_NVLINK_SHARE: Final = 0.83
_PCIE_SHARES: Final = {
    LinkKind.PIX: 0.86,
    LinkKind.PXB: 0.86,
    LinkKind.PHB: 0.86,
    LinkKind.NODE: 0.80,  # between PIX and SYS, which were measured
    LinkKind.SYS: 0.70,
}
_STAGED_SHARE: Final = 0.59
_LATENCIES_S: Final = {
    LinkKind.NVLINK: 2e-6,
    LinkKind.NVSWITCH: 2.3e-6,
    LinkKind.PIX: 4.1e-6,
    LinkKind.PXB: 5e-6,
    LinkKind.PHB: 6e-6,
    LinkKind.NODE: 7e-6,
    LinkKind.SYS: 8e-6,
}
_STAGED_LATENCY_S: Final = 15e-6
_ASSUMED_GENERATION: Final = 3  # where the driver says nothing: the least that a GPU server of today has
_ASSUMED_WIDTH: Final = 16


def nvlink_peak_bytes_per_s(*, version: int, lanes: int) -> float:
    """Return the published rate of ``lanes`` NVLink lanes, one way. An unknown version counts as version 2."""
    return _NVLINK_LANE_BYTES_PER_S.get(version, 25e9) * lanes


def pcie_peak_bytes_per_s(*, generation: int, width: int) -> float:
    """Return the published rate of a PCIe link after encoding, one way. Zero: not known, taken as 3.0 x16."""
    newest = max(_PCIE_LANE_BYTES_PER_S)
    lane = _PCIE_LANE_BYTES_PER_S[min(generation or _ASSUMED_GENERATION, newest)]
    return lane * (width or _ASSUMED_WIDTH)


def nvlink(*, version: int, lanes: int, through_switch: bool, half_rate: bool = False, p2p: P2P = P2P.UNKNOWN) -> Link:
    """Return the link of ``lanes`` NVLink lanes, directly or through NVSwitch.

    Args:
        half_rate: GPUs of compute capability 8.6 (A40, RTX A6000, RTX 3090) have lanes of 14.06 GB/s.
    """
    kind = LinkKind.NVSWITCH if through_switch else LinkKind.NVLINK
    peak = lanes * _HALF_RATE_LANE_BYTES_PER_S if half_rate else nvlink_peak_bytes_per_s(version=version, lanes=lanes)
    return Link(
        kind=kind,
        bandwidth_bytes_per_s=peak * _NVLINK_SHARE,
        latency_s=_LATENCIES_S[kind],
        peak_bytes_per_s=peak,
        lanes=lanes,
        generation=version,
        p2p=p2p,
    )


def pcie_link(kind: LinkKind, *, generation: int, width: int, p2p: P2P = P2P.UNKNOWN) -> Link:
    """Return the link of a PCIe path. Without P2P the host stages each copy, which costs bandwidth and latency.

    Args:
        generation, width: The lowest on the path; 0 if not known.
    """
    peak = pcie_peak_bytes_per_s(generation=generation, width=width)
    share = min(_PCIE_SHARES[kind], _STAGED_SHARE) if p2p.is_refused else _PCIE_SHARES[kind]
    return Link(
        kind=kind,
        bandwidth_bytes_per_s=peak * share,
        latency_s=max(_LATENCIES_S[kind], _STAGED_LATENCY_S) if p2p.is_refused else _LATENCIES_S[kind],
        peak_bytes_per_s=peak,
        generation=generation,
        width=width,
        p2p=p2p,
    )


def shared_memory_link() -> Link:
    """Return the link between two CPU devices of a host."""
    return Link(kind=LinkKind.SHARED_MEMORY, bandwidth_bytes_per_s=3.9e9, latency_s=20e-6)


def network_link(*, bits_per_s: float, latency_s: float = 20e-6, share: float = 0.9) -> Link:
    """Return a network link by its nominal rate, of which ``share`` is left for payload (framing, flow control)."""
    peak = bits_per_s / 8
    return Link(kind=LinkKind.NETWORK, bandwidth_bytes_per_s=peak * share, latency_s=latency_s, peak_bytes_per_s=peak)
