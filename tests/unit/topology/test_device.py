"""Devices: what is usable, and what cannot be."""

from dataclasses import replace

import pytest

from topology.device import Device, DeviceKind, cpu_devices


def test_cpu_devices_are_numbered_and_have_their_budget() -> None:
    devices = cpu_devices(count=3, memory_bytes=1000)
    assert [device.id for device in devices] == ["cpu:0", "cpu:1", "cpu:2"]
    assert {device.kind for device in devices} == {DeviceKind.CPU}
    assert {device.memory_usable_bytes for device in devices} == {1000}


def test_no_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one device"):
        cpu_devices(count=0, memory_bytes=1)


def test_reserved_memory_is_not_usable() -> None:
    device = Device(id="GPU-1", kind=DeviceKind.CUDA, memory_total_bytes=100, memory_reserved_bytes=30)
    assert device.memory_usable_bytes == 70


@pytest.mark.parametrize("reserved", [-1, 101])
def test_more_reserved_than_there_is_is_refused(reserved: int) -> None:
    with pytest.raises(ValueError, match="GPU-1"):
        Device(id="GPU-1", kind=DeviceKind.CUDA, memory_total_bytes=100, memory_reserved_bytes=reserved)


def test_memory_of_others_is_part_of_what_is_reserved() -> None:
    device = Device(id="G", kind=DeviceKind.CUDA, memory_total_bytes=9, memory_reserved_bytes=3, memory_others_bytes=2)
    assert device.is_shared
    with pytest.raises(ValueError, match="others hold 4 of 3"):
        replace(device, memory_others_bytes=4)


def test_threads_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match="-1 threads"):
        cpu_devices(count=1, memory_bytes=1, threads=-1)
