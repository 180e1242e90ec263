"""Published speeds by product name, shares of MIG instances, and the guess for CPU devices."""

import pytest

from topology.device import Device, DeviceKind, cpu_devices
from topology.gpu_specs import gpu_spec, spec_of
from topology.units import GIB


@pytest.mark.parametrize(
    ("name", "bytes_per_s", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 3350e9, 989.4e12),
        ("NVIDIA H100 PCIe", 2000e9, 756e12),
        ("NVIDIA A100-SXM4-80GB", 2039e9, 312e12),
        ("NVIDIA L40S", 864e9, 362.05e12),
        ("NVIDIA GeForce RTX 4090", 1008e9, 165.2e12),
        ("Tesla V100-SXM2-32GB", 900e9, 15.7e12),  # no bfloat16 units: as float32
        ("V100M32", 900e9, 15.7e12),
    ],
)
def test_products_are_known_by_the_driver_s_name(name: str, bytes_per_s: float, bf16: float) -> None:
    spec = gpu_spec(name)

    assert spec is not None
    assert spec.memory_bandwidth_bytes_per_s == bytes_per_s
    assert spec.flops_for("bfloat16") == bf16
    assert not spec.is_estimate


def test_an_unknown_product_has_no_figures() -> None:
    assert spec_of(Device(id="G", kind=DeviceKind.CUDA, memory_total_bytes=1, name="NVIDIA Z9")) is None
    assert gpu_spec("NVIDIA Z9 MIG 1g.10gb") is None


@pytest.mark.parametrize(
    ("name", "memory_share", "compute_share"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 1 / 8, 1 / 7),
        ("NVIDIA H100 80GB HBM3 MIG 1g.20gb", 2 / 8, 1 / 7),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 4 / 8, 3 / 7),
        ("NVIDIA H100 80GB HBM3 MIG 7g.80gb", 1, 1),
        ("NVIDIA A100-SXM4-40GB MIG 1c.3g.20gb", 4 / 8, 3 / 7),
        ("NVIDIA A30 MIG 2g.12gb", 2 / 4, 2 / 4),
    ],
)
def test_an_instance_has_its_share(name: str, memory_share: float, compute_share: float) -> None:
    whole, instance = gpu_spec(name.partition(" MIG ")[0]), gpu_spec(name)

    assert whole is not None
    assert instance is not None
    assert instance.memory_bandwidth_bytes_per_s == pytest.approx(whole.memory_bandwidth_bytes_per_s * memory_share)
    assert instance.flops_for("float16") == pytest.approx(whole.flops_for("float16") * compute_share)
    assert instance.is_estimate
    assert instance.nvlink_lanes == 0


def test_a_cpu_device_is_a_guess_that_says_so() -> None:
    one, four = (spec_of(cpu_devices(count=1, memory_bytes=GIB, threads=threads)[0]) for threads in (0, 4))

    assert one is not None
    assert four is not None
    assert one.is_estimate
    assert four.flops_for("float32") == 4 * one.flops_for("float32")
