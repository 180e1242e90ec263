"""NVML, the driver's library: the only module that imports pynvml. Every question has an answer or a ``Refusal``.

A driver that lacks a function, a GPU that is lost and a permission that is missing are answers here, not exceptions.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

import pynvml

from topology.states import DriverState, DriverStatus

T = TypeVar("T")
Handle = Any  # NVML's opaque pointer to one GPU or MIG instance


class Fault(Enum):
    """Why NVML did not answer."""

    NOT_SUPPORTED = "not supported by this GPU"
    MISSING_FUNCTION = "the driver is too old to say"
    NO_PERMISSION = "no permission"
    LOST = "lost: it fell off the bus, or needs a reset of the machine"
    NEEDS_RESET = "needs a reset"
    GONE = "not there any more"
    OUT_OF_RANGE = "out of range"
    OTHER = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """NVML did not answer ``function``."""

    fault: Fault
    function: str
    sentence: str


_FAULTS: Final[Mapping[int, Fault]] = {
    pynvml.NVML_ERROR_NOT_SUPPORTED: Fault.NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: Fault.MISSING_FUNCTION,
    pynvml.NVML_ERROR_NO_PERMISSION: Fault.NO_PERMISSION,
    pynvml.NVML_ERROR_GPU_IS_LOST: Fault.LOST,
    pynvml.NVML_ERROR_RESET_REQUIRED: Fault.NEEDS_RESET,
    pynvml.NVML_ERROR_NOT_FOUND: Fault.GONE,
    pynvml.NVML_ERROR_GPU_NOT_FOUND: Fault.GONE,
    pynvml.NVML_ERROR_INVALID_ARGUMENT: Fault.OUT_OF_RANGE,
}
_START_STATES: Final[Mapping[int, tuple[DriverState, str]]] = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        DriverState.NO_LIBRARY,
        "no NVIDIA driver on this host (libnvidia-ml.so.1 not found)",
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: (DriverState.NO_DRIVER, "the NVIDIA kernel driver is not loaded"),
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        DriverState.VERSION_MISMATCH,
        "the NVIDIA library and kernel module are of different versions (an update without a reboot)",
    ),
    pynvml.NVML_ERROR_NO_PERMISSION: (
        DriverState.NO_PERMISSION,
        "this user or container may not talk to the NVIDIA driver (/dev/nvidiactl)",
    ),
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: (
        DriverState.OLD_DRIVER,
        "the NVIDIA driver is too old: its library lacks nvmlInitWithFlags (R384 or newer is needed)",
    ),
}
# nvmlNvlinkVersion_t to generation
_NVLINK_GENERATIONS: Final[Mapping[int, int]] = {1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 6: 4, 7: 5, 8: 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes; ``used`` without what is reserved. An old driver does not say what is reserved and counts it as used."""

    total: int
    reserved: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that holds memory of a GPU; bytes are None where the driver hides them."""

    pid: int
    used_bytes: int | None


class Nvml:
    """An open session. ``missing`` collects the functions that this driver turned out to lack."""

    def __init__(self) -> None:
        self._missing: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._ask("nvmlShutdown")

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(sorted(self._missing))

    def driver_version(self) -> str:
        """Return the driver's version, empty if it does not say."""
        return _or(self._ask("nvmlSystemGetDriverVersion"), "")

    def cuda_version(self) -> str:
        """Return the newest CUDA that the driver serves, as ``13.0``; empty if it does not say."""
        number = _or(self._ask("nvmlSystemGetCudaDriverVersion_v2"), 0)
        return f"{number // 1000}.{number % 1000 // 10}" if number else ""

    def count(self) -> int | Refusal:
        """Return how many GPUs the driver lists, lost ones included."""
        return self._ask_int("nvmlDeviceGetCount")

    def handle(self, index: int) -> Handle | Refusal:
        return self._ask("nvmlDeviceGetHandleByIndex", index)

    def uuid(self, gpu: Handle) -> str | Refusal:
        return self._ask_text("nvmlDeviceGetUUID", gpu)

    def bus_id(self, gpu: Handle) -> str | Refusal:
        info = self._ask("nvmlDeviceGetPciInfo", gpu)
        return info if isinstance(info, Refusal) else _text(info.busId or info.busIdLegacy)

    def name(self, gpu: Handle) -> str | Refusal:
        return self._ask_text("nvmlDeviceGetName", gpu)

    def memory(self, gpu: Handle) -> Memory | Refusal:
        new = self._ask("nvmlDeviceGetMemoryInfo", gpu, pynvml.nvmlMemory_v2)
        if not isinstance(new, Refusal):
            return Memory(total=new.total, reserved=new.reserved, used=new.used)
        old = self._ask("nvmlDeviceGetMemoryInfo", gpu)
        return old if isinstance(old, Refusal) else Memory(total=old.total, reserved=0, used=old.used)

    def holders(self, gpu: Handle) -> tuple[Holder, ...] | Refusal:
        """Return the processes with memory of this GPU: computing, drawing, or both."""
        found: dict[int, int | None] = {}
        for kind in ("Compute", "Graphics"):
            listed = self._ask(f"nvmlDeviceGet{kind}RunningProcesses_v3", gpu)
            if isinstance(listed, Refusal) and listed.fault is Fault.MISSING_FUNCTION:
                listed = self._ask(f"nvmlDeviceGet{kind}RunningProcesses_v2", gpu)
            if isinstance(listed, Refusal):
                if kind == "Compute":
                    return listed
                continue
            found |= {each.pid: each.usedGpuMemory for each in listed}
        return tuple(Holder(pid=pid, used_bytes=used) for pid, used in found.items())

    def process_name(self, pid: int) -> str:
        """Return a process's program, empty if it may not be known."""
        return _or(self._ask("nvmlSystemGetProcessName", pid), "")

    def compute_capability(self, gpu: Handle) -> tuple[int, int] | None:
        answer = self._ask("nvmlDeviceGetCudaComputeCapability", gpu)
        return None if isinstance(answer, Refusal) else (answer[0], answer[1])

    def utilisation(self, gpu: Handle) -> tuple[float, float] | None:
        """Return the share of time with work on the multiprocessors, and with memory traffic: 0 to 1."""
        answer = self._ask("nvmlDeviceGetUtilizationRates", gpu)
        return None if isinstance(answer, Refusal) else (answer.gpu / 100, answer.memory / 100)

    def numa_node(self, gpu: Handle) -> int | None:
        node = _or(self._ask("nvmlDeviceGetNumaNodeId", gpu), -1)
        return node if node >= 0 else None

    def cpu_affinity(self, gpu: Handle) -> tuple[int, ...]:
        """Return the CPUs nearest to the GPU."""
        no_words: tuple[int, ...] = ()
        words = _or(self._ask("nvmlDeviceGetCpuAffinity", gpu, -(-(os.cpu_count() or 1) // 64)), no_words)
        return tuple(64 * place + bit for place, word in enumerate(words) for bit in range(64) if word >> bit & 1)

    def mig_mode(self, gpu: Handle) -> bool | None:
        """Return whether the GPU is divided into instances; None if it cannot be."""
        answer = self._ask("nvmlDeviceGetMigMode", gpu)
        return None if isinstance(answer, Refusal) else bool(answer[0])

    def mig_instances(self, gpu: Handle) -> Iterator[Handle]:
        """Yield the instances that are set up; numbers between may be free."""
        for index in range(_or(self._ask_int("nvmlDeviceGetMaxMigDeviceCount", gpu), 0)):
            instance = self._ask("nvmlDeviceGetMigDeviceHandleByIndex", gpu, index)
            if not isinstance(instance, Refusal):
                yield instance

    def instance_ids(self, instance: Handle) -> tuple[int | None, int | None]:
        """Return the numbers of the GPU instance and of the compute instance in it."""
        gpu_instance = self._ask("nvmlDeviceGetGpuInstanceId", instance)
        compute_instance = self._ask("nvmlDeviceGetComputeInstanceId", instance)
        return _or(gpu_instance, None), _or(compute_instance, None)

    def pcie_interface(self, gpu: Handle) -> tuple[int, int, int, int]:
        """Return generation and width at most, then now; 0 where the driver does not say."""
        return (
            _or(self._ask("nvmlDeviceGetMaxPcieLinkGeneration", gpu), 0),
            _or(self._ask("nvmlDeviceGetMaxPcieLinkWidth", gpu), 0),
            _or(self._ask("nvmlDeviceGetCurrPcieLinkGeneration", gpu), 0),
            _or(self._ask("nvmlDeviceGetCurrPcieLinkWidth", gpu), 0),
        )

    def common_ancestor(self, a: Handle, b: Handle) -> int | Refusal:
        """Return NVML's topology level of two GPUs: 10 PIX, 20 PXB, 30 PHB, 40 NODE, 50 SYS."""
        return self._ask_int("nvmlDeviceGetTopologyCommonAncestor", a, b)

    def p2p_status(self, a: Handle, b: Handle, capability: int) -> int | Refusal:
        """Return NVML's status of a P2P capability: 0 read, 1 write, 2 NVLink.

        By number, because pynvml's constant for reading is a tuple by mistake.
        """
        return self._ask_int("nvmlDeviceGetP2PStatus", a, b, capability)

    def nvlink_is_up(self, gpu: Handle, lane: int) -> bool | Refusal:
        answer = self._ask("nvmlDeviceGetNvLinkState", gpu, lane)
        return answer if isinstance(answer, Refusal) else bool(answer)

    def nvlink_generation(self, gpu: Handle, lane: int) -> int:
        """Return the generation of a lane, 0 if the driver does not say."""
        return _NVLINK_GENERATIONS.get(_or(self._ask("nvmlDeviceGetNvLinkVersion", gpu, lane), 0), 0)

    def nvlink_remote(self, gpu: Handle, lane: int) -> tuple[int, str]:
        """Return the type (0 GPU, 1 CPU, 2 switch, 255 unknown) and the PCI bus id of what a lane leads to."""
        kind = _or(self._ask("nvmlDeviceGetNvLinkRemoteDeviceType", gpu, lane), 255)
        info = self._ask("nvmlDeviceGetNvLinkRemotePciInfo", gpu, lane)
        return kind, "" if isinstance(info, Refusal) else _text(info.busId)

    def ecc_errors(self, gpu: Handle) -> tuple[int | None, int | None]:
        """Return uncorrected and corrected memory errors since the driver was loaded."""
        uncorrected = self._ask("nvmlDeviceGetTotalEccErrors", gpu, 1, 0)
        return _or(uncorrected, None), _or(self._ask("nvmlDeviceGetTotalEccErrors", gpu, 0, 0), None)

    def retired(self, gpu: Handle) -> tuple[int | None, bool | None, bool]:
        """Return memory rows (or pages, before Ampere) taken out of use, whether more wait, and whether that failed."""
        rows = self._ask("nvmlDeviceGetRemappedRows", gpu)
        if not isinstance(rows, Refusal):
            return rows[0] + rows[1], bool(rows[2]), bool(rows[3])
        pages = [self._ask("nvmlDeviceGetRetiredPages", gpu, cause) for cause in (0, 1)]
        known = [len(each) for each in pages if not isinstance(each, Refusal)]
        pending = self._ask("nvmlDeviceGetRetiredPagesPendingStatus", gpu)
        return sum(known) if known else None, None if isinstance(pending, Refusal) else bool(pending), False

    def recovery_action(self, gpu: Handle) -> int:
        """Return what the driver wants done after an error (XID): 0 nothing, 1 reset, 2 reboot, 3 and 4 drain."""
        values = self._ask("nvmlDeviceGetFieldValues", gpu, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
        if isinstance(values, Refusal) or values[0].nvmlReturn != pynvml.NVML_SUCCESS:
            return 0
        return int(values[0].value.uiVal)

    def _ask_int(self, function: str, *arguments: object) -> int | Refusal:
        answer: int | Refusal = self._ask(function, *arguments)
        return answer

    def _ask_text(self, function: str, *arguments: object) -> str | Refusal:
        answer: str | Refusal = self._ask(function, *arguments)
        return answer

    def _ask(self, function: str, *arguments: object) -> Any:
        try:
            return getattr(pynvml, function)(*arguments)
        except pynvml.NVMLError as error:
            fault = _FAULTS.get(error.value, Fault.OTHER)
            if fault is Fault.MISSING_FUNCTION:
                self._missing.add(function)
            return Refusal(fault=fault, function=function, sentence=f"{fault.value} ({error})")


@contextmanager
def nvml_session() -> Iterator[Nvml | DriverStatus]:
    """Open NVML for as long as the scope lasts, or say why it cannot be opened. GPUs are listed anew each time."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        state, sentence = _START_STATES.get(error.value, (DriverState.FAILED, f"the NVIDIA driver said: {error}"))
        yield DriverStatus(state=state, sentence=sentence)
        return
    with Nvml() as session:
        yield session


def _or(answer: Any, default: T) -> T:
    return default if isinstance(answer, Refusal) else cast("T", answer)


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
