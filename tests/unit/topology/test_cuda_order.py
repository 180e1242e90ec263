"""CUDA's numbers for devices, and what CUDA_VISIBLE_DEVICES shows of them."""

import pytest

from topology.cuda_order import CudaOrder, cuda_order, visible_environment
from topology.gpu import GpuRecord, MigMode

A, B, C = "GPU-aaaa1111", "GPU-aaaa2222", "GPU-cccc3333"
M1, M2 = "MIG-1111", "MIG-2222"
# NVML's order is not that of the bus.
GPUS = tuple(
    GpuRecord(uuid=uuid, pci_bus_id=f"0000:{bus}:00.0", name="NVIDIA L4", memory_total_bytes=1)
    for uuid, bus in ((C, "90"), (A, "10"), (B, "20"))
)
MIXED = (*GPUS[1:], GpuRecord(uuid=C, pci_bus_id="0000:05:00.0", name="NVIDIA T4", memory_total_bytes=1))
DIVIDED = (
    GpuRecord(uuid=A, pci_bus_id="0000:10:00.0", name="g", memory_total_bytes=1, mig_mode=MigMode.ENABLED),
    *(
        GpuRecord(
            uuid=uuid,
            pci_bus_id="0000:10:00.0",
            name="g MIG",
            memory_total_bytes=1,
            parent_uuid=A,
            gpu_instance_id=number,
            compute_instance_id=0,
        )
        for number, uuid in ((1, M1), (2, M2))
    ),
    GpuRecord(uuid=B, pci_bus_id="0000:20:00.0", name="g", memory_total_bytes=1),
)


def shown(value: str | None, gpus: tuple[GpuRecord, ...] = GPUS, order: str = "PCI_BUS_ID") -> CudaOrder:
    environment = {"CUDA_DEVICE_ORDER": order} | ({} if value is None else {"CUDA_VISIBLE_DEVICES": value})
    return cuda_order(gpus, environment)


@pytest.mark.parametrize(
    ("value", "uuids"),
    [
        (None, (A, B, C)),
        ("2,0", (C, A)),
        (f"{B},{A}", (B, A)),
        ("GPU-c", (C,)),
        ("1, GPU-cccc", (B, C)),
        ("", ()),
        ("-1", ()),
        ("1,-1,0", (B,)),
        ("0,7,1", (A,)),
        ("GPU-aaaa,2", ()),  # two begin so
        ("0,GPU-aaaa1111", ()),  # the same twice
        ("aaaa1111", ()),
    ],
)
def test_what_is_visible_in_which_order(value: str | None, uuids: tuple[str, ...]) -> None:
    assert shown(value).uuids == uuids


def test_the_entry_that_ends_the_list_is_named() -> None:
    (note,) = shown("0,7,1").notes

    assert '"7"' in note
    assert shown("-1").notes == ()
    assert "twice" in shown("0,0").notes[0]


def test_numbers_are_certain_by_bus_id_only_where_products_differ() -> None:
    assert shown("0", MIXED).is_certain
    assert shown("0", MIXED).uuids == (C,)
    by_speed = shown("0", MIXED, order="FASTEST_FIRST")
    assert not by_speed.is_certain
    assert "several products" in by_speed.notes[0]
    assert shown(B, MIXED, order="FASTEST_FIRST").is_certain
    assert shown("0", GPUS, order="FASTEST_FIRST").is_certain


def test_an_order_that_cuda_does_not_know() -> None:
    assert "not known" in shown("0", order="PCI").notes[0]


@pytest.mark.parametrize(
    ("value", "uuids"),
    [
        (None, (M1,)),  # one instance at most, and nothing beside it
        (M2, (M2,)),
        (f"MIG-{A}/2/0", (M2,)),
        (f"MIG-{A}/9/0", ()),
        (f"{M2},{M1},{B}", (M2,)),
        (B, (B,)),
        (A, (M1,)),
        ("0", (M1,)),
        ("1", (B,)),
    ],
)
def test_a_process_sees_one_instance(value: str | None, uuids: tuple[str, ...]) -> None:
    assert shown(value, DIVIDED).uuids == uuids


def test_a_daemon_gives_instances_to_several_processes() -> None:
    order = cuda_order(DIVIDED, {"CUDA_VISIBLE_DEVICES": f"{M2},{M1}"}, single_instance=False)

    assert order.uuids == (M2, M1)


def test_a_worker_is_shown_exactly_its_devices() -> None:
    environment = visible_environment([C, A])

    assert cuda_order(GPUS, environment).uuids == (C, A)
    assert cuda_order(MIXED, environment).is_certain
