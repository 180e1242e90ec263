"""Published speed of devices, by product name; for a CPU device a guess per thread. A profile takes its place.

Source of each figure: NVIDIA's data sheet or architecture white paper of that product (dense, without sparsity, tensor
cores for the 16-bit types with 32-bit accumulation, plain FP32 units for float32, as torch computes by default).
NVLink: lanes times the rate of ``link_figures``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from topology.device import Device, DeviceKind
from topology.units import GIB

_TFLOPS: Final = 1e12
_GB: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """What a device can do at most.

    Args:
        flops_per_s: Dense, by dtype: ``float32``, ``bfloat16``, ``float16``. A type that the hardware lacks is missing.
        is_estimate: A guess or derived, not published.
    """

    name: str
    memory_bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    nvlink_generation: int = 0
    nvlink_lanes: int = 0
    is_estimate: bool = False

    def flops_for(self, dtype: str) -> float:
        """Return FLOP/s for a dtype; one without hardware support runs as float32."""
        return self.flops_per_s.get(dtype, self.flops_per_s["float32"])


def _gpu(
    name: str, gb_per_s: float, *, fp32: float, fp16: float, bf16: float | None = None, nvlink: tuple[int, int] = (0, 0)
) -> DeviceSpec:
    """Return a row. TFLOP/s; ``bf16`` is as ``fp16`` unless said (0: not supported); ``nvlink``: generation, lanes."""
    bfloat16 = fp16 if bf16 is None else bf16
    flops = {"float32": fp32 * _TFLOPS, "float16": fp16 * _TFLOPS}
    return DeviceSpec(
        name=name,
        memory_bandwidth_bytes_per_s=gb_per_s * _GB,
        flops_per_s=flops | ({"bfloat16": bfloat16 * _TFLOPS} if bfloat16 else {}),
        nvlink_generation=nvlink[0],
        nvlink_lanes=nvlink[1],
    )


# Names as NVML reports them, without maker and brand.
_GPUS: Final = (
    _gpu("B200", 8000, fp32=75, fp16=2250, nvlink=(5, 18)),
    _gpu("H200", 4800, fp32=67, fp16=989.4, nvlink=(4, 18)),
    _gpu("H200 NVL", 4800, fp32=60, fp16=835.5, nvlink=(4, 18)),
    _gpu("H100 80GB HBM3", 3350, fp32=67, fp16=989.4, nvlink=(4, 18)),
    _gpu("H100 PCIe", 2000, fp32=51, fp16=756, nvlink=(4, 12)),
    _gpu("H100 NVL", 3900, fp32=60, fp16=835.5, nvlink=(4, 12)),
    _gpu("H20", 4000, fp32=44, fp16=148, nvlink=(4, 18)),
    _gpu("GH200 480GB", 4000, fp32=67, fp16=989.4),
    _gpu("A100-SXM4-80GB", 2039, fp32=19.5, fp16=312, nvlink=(3, 12)),
    _gpu("A100-SXM4-40GB", 1555, fp32=19.5, fp16=312, nvlink=(3, 12)),
    _gpu("A100 80GB PCIe", 1935, fp32=19.5, fp16=312, nvlink=(3, 12)),
    _gpu("A100-PCIE-40GB", 1555, fp32=19.5, fp16=312, nvlink=(3, 12)),
    _gpu("A800-SXM4-80GB", 2039, fp32=19.5, fp16=312, nvlink=(3, 8)),
    _gpu("A30", 933, fp32=10.3, fp16=165, nvlink=(3, 4)),
    _gpu("A40", 696, fp32=37.4, fp16=149.7),
    _gpu("A10", 600, fp32=31.2, fp16=125),
    _gpu("A10G", 600, fp32=35, fp16=70),
    _gpu("L4", 300, fp32=30.3, fp16=121),
    _gpu("L40", 864, fp32=90.5, fp16=181.05),
    _gpu("L40S", 864, fp32=91.6, fp16=362.05),
    _gpu("T4", 320, fp32=8.1, fp16=65, bf16=0),
    _gpu("V100-SXM2-16GB", 900, fp32=15.7, fp16=125, bf16=0, nvlink=(2, 6)),
    _gpu("V100-SXM2-32GB", 900, fp32=15.7, fp16=125, bf16=0, nvlink=(2, 6)),
    _gpu("V100-PCIE-16GB", 900, fp32=14, fp16=112, bf16=0),
    _gpu("V100-PCIE-32GB", 900, fp32=14, fp16=112, bf16=0),
    _gpu("P100-SXM2-16GB", 732, fp32=10.6, fp16=21.2, bf16=0, nvlink=(1, 4)),
    _gpu("P100-PCIE-16GB", 732, fp32=9.3, fp16=18.7, bf16=0),
    _gpu("RTX A6000", 768, fp32=38.7, fp16=154.8),
    _gpu("RTX 6000 Ada Generation", 960, fp32=91.1, fp16=364.2),
    _gpu("RTX 3090", 936, fp32=35.6, fp16=71),
    _gpu("RTX 4090", 1008, fp32=82.6, fp16=165.2),
    _gpu("RTX 5090", 1792, fp32=104.8, fp16=209.5),
)
_BY_NAME: Final[Mapping[str, DeviceSpec]] = {spec.name.lower(): spec for spec in _GPUS}
# Short names that cluster traces and people use.
_ALIASES: Final = {
    "h100": "h100 80gb hbm3",
    "a100": "a100-sxm4-80gb",
    "v100m16": "v100-sxm2-16gb",
    "v100m32": "v100-sxm2-32gb",
    "p100": "p100-pcie-16gb",
}
_BRANDS: Final = re.compile(r"^(nvidia\s+|tesla\s+|geforce\s+)+")
_MIG: Final = re.compile(r"^(?P<gpu>.+?)\s+mig\s+(?:\d+c\.)?(?P<slices>\d+)g\.(?P<gb>\d+)gb\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class _MigLayout:
    """How a GPU is divided, and the size in the name of the instance that takes all of it (NVIDIA MIG user guide)."""

    whole_gb: int
    compute_slices: int = 7
    memory_slices: int = 8


_MIG_LAYOUTS: Final = {
    "A100-SXM4-40GB": _MigLayout(whole_gb=40),
    "A100-PCIE-40GB": _MigLayout(whole_gb=40),
    "A30": _MigLayout(whole_gb=24, compute_slices=4, memory_slices=4),
    "H100 NVL": _MigLayout(whole_gb=94),
    "H200": _MigLayout(whole_gb=141),
    "H200 NVL": _MigLayout(whole_gb=141),
    "H20": _MigLayout(whole_gb=96),
    "B200": _MigLayout(whole_gb=180),
}

# A guess: what one thread of a server core of the last ten years does in float32 with AVX2, and of memory traffic.
_CPU_THREAD_FLOPS: Final = {"float32": 30e9, "bfloat16": 15e9, "float16": 8e9}
_CPU_THREAD_BYTES_PER_S: Final = 10.0 * GIB
_CPU_SOCKET_BYTES_PER_S: Final = 100e9  # threads share the memory controllers


def spec_of(device: Device) -> DeviceSpec | None:
    """Return what a device can do, or None for a GPU that this table does not have."""
    if device.kind is DeviceKind.CPU:
        return _cpu(max(1, device.threads))
    return gpu_spec(device.name, memory_bytes=device.memory_total_bytes)


def gpu_spec(name: str, *, memory_bytes: int = 0) -> DeviceSpec | None:
    """Return the row of a product name as NVML reports it. A MIG instance gets its share of the GPU.

    Args:
        memory_bytes: Of the device; it stands in where an instance's name does not say how much it has.
    """
    short = _BRANDS.sub("", name.strip().lower())
    if (mig := _MIG.match(short)) is not None:
        whole = gpu_spec(mig["gpu"])
        size_gb = int(mig["gb"]) or memory_bytes / _GB
        return None if whole is None else _mig_share(whole, slices=int(mig["slices"]), size_gb=size_gb, name=name)
    return _BY_NAME.get(_ALIASES.get(short, short))


def _mig_share(whole: DeviceSpec, *, slices: int, size_gb: float, name: str) -> DeviceSpec:
    """Return what an instance has of its GPU. Instances have no NVLink."""
    layout = _MIG_LAYOUTS.get(whole.name, _MigLayout(whole_gb=80))
    memory_slices = max(1, round(size_gb / (layout.whole_gb / layout.memory_slices)))
    memory_share = min(1.0, memory_slices / layout.memory_slices)
    compute_share = min(1.0, slices / layout.compute_slices)
    return replace(
        whole,
        name=name,
        memory_bandwidth_bytes_per_s=whole.memory_bandwidth_bytes_per_s * memory_share,
        flops_per_s={dtype: flops * compute_share for dtype, flops in whole.flops_per_s.items()},
        nvlink_generation=0,
        nvlink_lanes=0,
        is_estimate=True,
    )


def _cpu(threads: int) -> DeviceSpec:
    return DeviceSpec(
        name=f"CPU, {threads} thread{'s' if threads > 1 else ''}",
        memory_bandwidth_bytes_per_s=min(_CPU_THREAD_BYTES_PER_S * threads, _CPU_SOCKET_BYTES_PER_S),
        flops_per_s={dtype: flops * threads for dtype, flops in _CPU_THREAD_FLOPS.items()},
        is_estimate=True,
    )
