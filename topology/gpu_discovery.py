"""From NVML's answers to GPU records: one per GPU and one per MIG instance. A GPU that does not answer is named."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from topology.gpu import GpuProcess, GpuRecord, MigMode, NvLinkLane, PcieInterface, RemoteEnd
from topology.nvml import Fault, Handle, Holder, Memory, Nvml, Refusal
from topology.pcie import PciTree, normal_bus_id
from topology.states import Health, HealthState
from topology.units import MIB

_MOST_LANES: Final = 36
_REMOTE_ENDS: Final = {0: RemoteEnd.GPU, 1: RemoteEnd.CPU, 2: RemoteEnd.SWITCH}
_UNSEEN_BYTES: Final = 256 * MIB  # used by nobody that NVML names: more than this is a process that we may not see
_RECOVERY_WANTS_RESET: Final = {1: "a reset", 2: "a reboot", 6: "a reset of its bus", 7: "a reboot"}
_RECOVERY_DRAINS: Final = (3, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundGpu:
    """A GPU or instance with the handle under which this session knows it."""

    record: GpuRecord
    handle: Handle


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What there is. ``unreadable`` has a sentence for every GPU without an identity."""

    gpus: tuple[FoundGpu, ...]
    unreadable: tuple[str, ...]


def find_gpus(session: Nvml, *, tree: PciTree, own_pids: frozenset[int], proc: Path) -> Found:
    """Ask about every GPU.

    Args:
        own_pids: Processes whose memory is ours, so not other tenants'.
        proc: Where procfs is mounted, for the names of processes.
    """
    count = session.count()
    if isinstance(count, Refusal):
        return Found(gpus=(), unreadable=(f"the driver does not list its GPUs: {count.sentence}",))
    reader = _Reader(session, tree=tree, own_pids=own_pids, proc=proc)
    gpus: list[FoundGpu] = []
    unreadable: list[str] = []
    for index in range(count):
        found = reader.gpu(index)
        if isinstance(found, str):
            unreadable.append(found)
        else:
            gpus += found
    return Found(gpus=tuple(gpus), unreadable=tuple(unreadable))


class _Reader:
    def __init__(self, session: Nvml, *, tree: PciTree, own_pids: frozenset[int], proc: Path) -> None:
        self._nvml = session
        self._tree = tree
        self._own_pids = own_pids
        self._proc = proc

    def gpu(self, index: int) -> list[FoundGpu] | str:
        """Return a GPU with its instances, or why it has no identity."""
        handle = self._nvml.handle(index)
        if isinstance(handle, Refusal):
            return f"GPU {index} in the driver's list: {handle.sentence}"
        uuid, bus_id = self._nvml.uuid(handle), self._nvml.bus_id(handle)
        if isinstance(uuid, Refusal):
            where = "" if isinstance(bus_id, Refusal) else f" at {normal_bus_id(bus_id)}"
            return f"GPU {index} in the driver's list{where}: {uuid.sentence}"
        place = "" if isinstance(bus_id, Refusal) else normal_bus_id(bus_id)
        whole = self._record(handle, uuid=uuid, bus_id=place)
        if whole.health.state is HealthState.LOST:
            return [FoundGpu(record=whole, handle=handle)]
        whole = self._with_wires(whole, handle)
        return [FoundGpu(record=whole, handle=handle), *self._instances(whole, handle)]

    def _record(self, handle: Handle, *, uuid: str, bus_id: str) -> GpuRecord:
        name, memory = self._nvml.name(handle), self._nvml.memory(handle)
        holders = self._nvml.holders(handle)
        record = GpuRecord(
            uuid=uuid,
            pci_bus_id=bus_id,
            name="" if isinstance(name, Refusal) else name,
            memory_total_bytes=0,
            health=self._health(handle, memory),
        )
        if isinstance(memory, Refusal):
            return record
        return self._with_memory(record, memory, () if isinstance(holders, Refusal) else holders)

    def _with_memory(self, record: GpuRecord, memory: Memory, holders: tuple[Holder, ...]) -> GpuRecord:
        """Tell ours from others'. Much that nobody named holds, or a hidden size, is somebody's whom we cannot see."""
        own = sum(each.used_bytes or 0 for each in holders if each.pid in self._own_pids)
        others = [each for each in holders if each.pid not in self._own_pids]
        known = sum(each.used_bytes or 0 for each in others)
        unnamed = max(0, memory.used - own - known)
        is_hidden = any(each.used_bytes is None for each in others) or unnamed > _UNSEEN_BYTES
        used = min(memory.used, memory.total)
        return replace(
            record,
            memory_total_bytes=memory.total,
            memory_reserved_bytes=memory.reserved,
            memory_used_bytes=used,
            memory_own_bytes=min(own, used),
            memory_others_bytes=min(known + (unnamed if is_hidden else 0), used),
            processes=tuple(
                GpuProcess(pid=each.pid, name=self._process_name(each.pid), used_bytes=each.used_bytes)
                for each in others
            ),
        )

    def _with_wires(self, record: GpuRecord, handle: Handle) -> GpuRecord:
        """Add what is asked of whole GPUs only."""
        busy, is_divided = self._nvml.utilisation(handle), self._nvml.mig_mode(handle)
        most_generation, most_width, generation, width = self._nvml.pcie_interface(handle)
        node = self._nvml.numa_node(handle)
        return replace(
            record,
            compute_capability=self._nvml.compute_capability(handle),
            utilisation=None if busy is None else busy[0],
            memory_utilisation=None if busy is None else busy[1],
            numa_node=self._tree.numa_node(record.pci_bus_id) if node is None else node,
            cpu_affinity=self._nvml.cpu_affinity(handle),
            mig_mode={None: MigMode.UNSUPPORTED, False: MigMode.DISABLED, True: MigMode.ENABLED}[is_divided],
            pcie=PcieInterface(
                max_generation=most_generation,
                max_width=most_width,
                current_generation=generation,
                current_width=width,
            ),
            nvlink_lanes=tuple(self._lanes(handle)),
        )

    def _lanes(self, handle: Handle) -> Iterator[NvLinkLane]:
        for lane in range(_MOST_LANES):
            is_up = self._nvml.nvlink_is_up(handle, lane)
            if isinstance(is_up, Refusal):
                if is_up.fault is Fault.NOT_SUPPORTED:  # for this lane; there may be further ones
                    continue
                return
            if not is_up:
                continue
            kind, bus_id = self._nvml.nvlink_remote(handle, lane)
            yield NvLinkLane(
                lane=lane,
                version=self._nvml.nvlink_generation(handle, lane),
                remote=_REMOTE_ENDS.get(kind, RemoteEnd.UNKNOWN),
                remote_bus_id=normal_bus_id(bus_id) if bus_id else "",
            )

    def _instances(self, whole: GpuRecord, handle: Handle) -> list[FoundGpu]:
        """Return the MIG instances. Compute instances of one GPU instance share its memory: each gets its part."""
        if whole.mig_mode is not MigMode.ENABLED:
            return []
        found: list[FoundGpu] = []
        for instance in self._nvml.mig_instances(handle):
            uuid = self._nvml.uuid(instance)
            if isinstance(uuid, Refusal):
                continue
            gpu_instance, compute_instance = self._nvml.instance_ids(instance)
            record = replace(
                self._record(instance, uuid=uuid, bus_id=whole.pci_bus_id),
                parent_uuid=whole.uuid,
                compute_capability=whole.compute_capability,
                numa_node=whole.numa_node,
                cpu_affinity=whole.cpu_affinity,
                pcie=whole.pcie,
                health=whole.health,
                gpu_instance_id=gpu_instance,
                compute_instance_id=compute_instance,
            )
            found.append(FoundGpu(record=record, handle=instance))
        return [replace(each, record=_part_of_instance(each.record, found)) for each in found]

    def _health(self, handle: Handle, memory: Memory | Refusal) -> Health:
        """Return the worst that is known: lost, not permitted, needs a reset, memory errors, fine."""
        if isinstance(memory, Refusal):
            return _health_without_memory(memory)
        uncorrected, corrected = self._nvml.ecc_errors(handle)
        retired, is_pending, has_failed = self._nvml.retired(handle)
        action = self._nvml.recovery_action(handle)
        state, sentence = HealthState.OK, ""
        if uncorrected:
            state, sentence = HealthState.DEGRADED, f"{uncorrected} uncorrected memory errors since the driver started"
        if is_pending:
            state, sentence = HealthState.DEGRADED, "memory waits for a reset to be taken out of use"
        if action in _RECOVERY_DRAINS:
            state, sentence = HealthState.DEGRADED, "the driver wants the GPU drained and reset after an error"
        if has_failed:
            state, sentence = HealthState.NEEDS_RESET, "broken memory could not be replaced by spare rows"
        if action in _RECOVERY_WANTS_RESET:
            state = HealthState.NEEDS_RESET
            sentence = f"the driver wants {_RECOVERY_WANTS_RESET[action]} after an error"
        return Health(
            state=state,
            sentence=sentence,
            ecc_uncorrected=uncorrected,
            ecc_corrected=corrected,
            retired_pages=retired,
            is_retirement_pending=is_pending,
        )

    def _process_name(self, pid: int) -> str:
        """Return the program's name. NVML's pids are the host's, so procfs of a container may not have them."""
        if name := self._nvml.process_name(pid):
            return Path(name.split()[0]).name if name.split() else name
        try:
            return (self._proc / str(pid) / "comm").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""


def _health_without_memory(refusal: Refusal) -> Health:
    states = {
        Fault.LOST: HealthState.LOST,
        Fault.GONE: HealthState.LOST,
        Fault.NEEDS_RESET: HealthState.NEEDS_RESET,
        Fault.NO_PERMISSION: HealthState.NO_PERMISSION,
    }
    return Health(state=states.get(refusal.fault, HealthState.UNKNOWN), sentence=refusal.sentence)


def _part_of_instance(record: GpuRecord, all_found: list[FoundGpu]) -> GpuRecord:
    if record.gpu_instance_id is None:
        return record
    sharers = sum(each.record.gpu_instance_id == record.gpu_instance_id for each in all_found)
    return record if sharers < 2 else replace(record, memory_total_bytes=record.memory_total_bytes // sharers)
