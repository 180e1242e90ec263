"""From UUIDs to the numbers by which CUDA knows devices, and back: explicit, because CUDA's order is not NVML's.

What CUDA does (CUDA C++ Programming Guide, "CUDA Environment Variables"; NVIDIA MIG user guide, "Device Enumeration"):
- ``CUDA_DEVICE_ORDER`` is ``FASTEST_FIRST`` by default, by a heuristic that is not published, or ``PCI_BUS_ID``.
- ``CUDA_VISIBLE_DEVICES`` names devices by number in that order, by UUID or the beginning of one, or a MIG instance.
  The first entry that is not valid ends the list; an empty value hides everything; so does naming a device twice.
- A process sees one MIG instance at most: the one that it names first, or the first of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from topology.gpu import GpuRecord, MigMode

ORDER: Final = "CUDA_DEVICE_ORDER"
VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
BY_BUS_ID: Final = "PCI_BUS_ID"


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaOrder:
    """The devices that CUDA shows to a process, in its order: the device with number N is ``uuids[N]``.

    Args:
        is_certain: False where the order rests on CUDA's own heuristic.
        notes: What is odd about the environment, for people.
    """

    uuids: tuple[str, ...]
    is_certain: bool = True
    notes: tuple[str, ...] = ()


def visible_environment(uuids: Sequence[str]) -> dict[str, str]:
    """Return the variables that show exactly these devices to a process, in this order, whatever its CUDA would do."""
    return {ORDER: BY_BUS_ID, VISIBLE: ",".join(uuids)}


def cuda_order(gpus: Sequence[GpuRecord], environment: Mapping[str, str], *, single_instance: bool = True) -> CudaOrder:
    """Return what CUDA shows to a process with this environment.

    Args:
        single_instance: Whether only the first MIG instance counts, as in one process; else all that are named.
    """
    ordered, is_certain, notes = _enumeration(gpus, environment.get(ORDER, ""))
    wanted = environment.get(VISIBLE)
    if wanted is None:
        shown = [_first_instance(gpu, gpus) if gpu.mig_mode is MigMode.ENABLED else gpu.uuid for gpu in ordered]
        return _order([uuid for uuid in shown if uuid], gpus, is_certain, notes, single_instance=single_instance)
    chosen, used_numbers, bad = _chosen(wanted, ordered, gpus)
    if bad:
        notes.append(bad)
    if len(set(chosen)) < len(chosen):
        return CudaOrder(uuids=(), notes=(*notes, f"{VISIBLE}={wanted} names a device twice: CUDA shows none"))
    return _order(chosen, gpus, is_certain or not used_numbers, notes, single_instance=single_instance)


def _enumeration(gpus: Sequence[GpuRecord], order: str) -> tuple[list[GpuRecord], bool, list[str]]:
    """Return the whole GPUs in CUDA's order, whether that is certain, and notes.

    1. PCI_BUS_ID: by bus id.
    2. FASTEST_FIRST with GPUs of one product: none is faster, so by bus id, too.
    3. FASTEST_FIRST with several: not to be told from here.
    """
    whole = sorted((gpu for gpu in gpus if not gpu.is_mig_instance), key=lambda gpu: gpu.pci_bus_id)
    notes = [] if order in ("", BY_BUS_ID, "FASTEST_FIRST") else [f"{ORDER}={order} is not known: CUDA ignores it"]
    if order == BY_BUS_ID or len({gpu.name for gpu in whole}) <= 1:
        return whole, True, notes
    notes.append(f"GPUs of several products: CUDA's numbers are certain with {ORDER}={BY_BUS_ID} only")
    return whole, False, notes


def _chosen(wanted: str, ordered: Sequence[GpuRecord], gpus: Sequence[GpuRecord]) -> tuple[list[str], bool, str]:
    """Return the UUIDs named, whether numbers were used, and what is wrong with the first bad entry."""
    chosen: list[str] = []
    used_numbers = False
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.isdecimal():
            used_numbers = True
            found = _numbered(int(entry), ordered, gpus)
        else:
            found = _named(entry, gpus)
        if found is None:
            reason = "" if wanted.strip() in ("", "-1", "NoDevFiles") else _reason(entry, wanted)
            return chosen, used_numbers, reason
        chosen.append(found)
    return chosen, used_numbers, ""


def _reason(entry: str, wanted: str) -> str:
    return f'{VISIBLE}={wanted}: "{entry}" is no device or several: CUDA ignores it and what follows'


def _numbered(number: int, ordered: Sequence[GpuRecord], gpus: Sequence[GpuRecord]) -> str | None:
    if number >= len(ordered):
        return None
    gpu = ordered[number]
    return _first_instance(gpu, gpus) or None if gpu.mig_mode is MigMode.ENABLED else gpu.uuid


def _named(entry: str, gpus: Sequence[GpuRecord]) -> str | None:
    """Return the one device whose UUID begins so, or whose old name this is: ``MIG-GPU-UUID/instance/compute``."""
    if entry.startswith("MIG-GPU-"):
        parent, _, numbers = entry.removeprefix("MIG-").partition("/")
        return next((gpu.uuid for gpu in gpus if gpu.parent_uuid == parent and _numbers(gpu) == numbers), None)
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    found = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
    if len(found) != 1:
        return None
    return _first_instance(found[0], gpus) or None if found[0].mig_mode is MigMode.ENABLED else found[0].uuid


def _numbers(gpu: GpuRecord) -> str:
    return f"{gpu.gpu_instance_id}/{gpu.compute_instance_id}"


def _first_instance(gpu: GpuRecord, gpus: Sequence[GpuRecord]) -> str:
    return next((each.uuid for each in gpus if each.parent_uuid == gpu.uuid), "")


def _order(
    chosen: Sequence[str], gpus: Sequence[GpuRecord], is_certain: bool, notes: Sequence[str], *, single_instance: bool
) -> CudaOrder:
    instances = {gpu.uuid for gpu in gpus if gpu.is_mig_instance}
    first = next((uuid for uuid in chosen if uuid in instances), None)
    if first is None or len(chosen) == 1 or not single_instance:
        return CudaOrder(uuids=tuple(chosen), is_certain=is_certain, notes=tuple(notes))
    note = "a process sees one MIG instance at most, and no other device beside it"
    return CudaOrder(uuids=(first,), is_certain=is_certain, notes=(*notes, note))
