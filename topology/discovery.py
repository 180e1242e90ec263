"""What this host offers: GPUs by NVML and sysfs, or CPU devices by configuration."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from topology.cuda_order import VISIBLE, CudaOrder, cuda_order
from topology.device import Device, cpu_devices
from topology.gpu import GpuRecord, device_of
from topology.link import Link
from topology.pcie import SYSFS, PciTree
from topology.states import DriverState, DriverStatus
from topology.topology import HostTopology, PairKey

PROCFS: Final = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuBudget:
    """What the configuration gives to CPU devices."""

    count: int
    memory_bytes: int
    threads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Where discovery looks: the parts of this machine, so that a test can give it another one."""

    host_id: str = field(default_factory=lambda: os.uname().nodename)
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    sysfs: Path = SYSFS
    procfs: Path = PROCFS


def discover_cpu(budget: CpuBudget, *, surroundings: Surroundings | None = None) -> HostTopology:
    """Return this host as CPU devices, without asking for GPUs."""
    here = surroundings or Surroundings()
    return HostTopology(host_id=here.host_id, devices=_cpu(budget, here))


def discover(
    *,
    cpu: CpuBudget | None = None,
    own_pids: frozenset[int] = frozenset(),
    surroundings: Surroundings | None = None,
) -> HostTopology:
    """Return what this host offers now. Never fails: what cannot be seen is said in ``driver``, or in a GPU's health.

    GPUs that cannot take work (lost, divided into instances, hidden by ``CUDA_VISIBLE_DEVICES``) are in ``gpus`` only.
    Takes some milliseconds per GPU; without a driver, next to nothing.

    Args:
        cpu: CPU devices to use where no GPU can take work; None for none.
        own_pids: Processes whose memory is ours.
    """
    here = surroundings or Surroundings()
    driver, gpus, links = _ask_driver(here, own_pids)
    shown = visible_of(gpus, here.environment)
    devices = tuple(device_of(gpu, host_id=here.host_id) for gpu in gpus if gpu.takes_work and gpu.uuid in shown.uuids)
    if not devices and cpu is not None:
        devices = _cpu(cpu, here)
    ids = {device.id for device in devices}
    return HostTopology(
        host_id=here.host_id,
        devices=devices,
        links={pair: link for pair, link in links.items() if ids.issuperset(pair)},
        gpus=gpus,
        driver=replace(driver, notes=shown.notes),
    )


def visible_of(gpus: tuple[GpuRecord, ...], environment: Mapping[str, str]) -> CudaOrder:
    """Return the devices that we may use: all but those hidden from us by ``CUDA_VISIBLE_DEVICES``.

    Without that variable every MIG instance counts, because each stage worker gets a view of its own.
    """
    if environment.get(VISIBLE) is None:
        return CudaOrder(uuids=tuple(gpu.uuid for gpu in gpus))
    return cuda_order(gpus, environment, single_instance=False)


def _ask_driver(
    here: Surroundings, own_pids: frozenset[int]
) -> tuple[DriverStatus, tuple[GpuRecord, ...], Mapping[PairKey, Link]]:
    from topology.gpu_discovery import find_gpus  # pynvml: not for those who only read snapshots
    from topology.gpu_links import find_links
    from topology.nvml import nvml_session

    tree = PciTree(here.sysfs)
    with nvml_session() as session:
        if isinstance(session, DriverStatus):
            return session, (), {}
        version = session.driver_version()
        found = find_gpus(session, tree=tree, own_pids=own_pids, proc=here.procfs)
        links = find_links(session, [each for each in found.gpus if each.record.health.is_usable], tree=tree)
        state, sentence = _verdict(len(found.gpus), found.unreadable, session.missing, version)
        status = DriverStatus(
            state=state,
            sentence=sentence,
            driver_version=version,
            cuda_version=session.cuda_version(),
            missing=session.missing,
            unreadable=found.unreadable,
        )
    return status, tuple(each.record for each in found.gpus), links


def _verdict(
    count: int, unreadable: tuple[str, ...], missing: tuple[str, ...], version: str
) -> tuple[DriverState, str]:
    """Return what to say of a driver that answers: the first that is true of no GPUs, an old driver, all well."""
    if count == 0 and not unreadable:
        return DriverState.NO_GPUS, "the NVIDIA driver is loaded, but there is no GPU"
    if missing:
        lacks = f"{missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else missing[0]
        return DriverState.OLD_DRIVER, f"driver {version or 'of unknown version'} is old: it lacks {lacks}"
    return DriverState.OK, ""


def _cpu(budget: CpuBudget, here: Surroundings) -> tuple[Device, ...]:
    return cpu_devices(
        count=budget.count, memory_bytes=budget.memory_bytes, threads=budget.threads, host_id=here.host_id
    )
