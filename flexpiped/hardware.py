"""What this host offers to the daemon: devices by the configuration and by what is here, with what was measured.

``devices.kind`` decides: "cpu" asks no driver; "cuda" wants GPUs and says why there are none; "auto" takes GPUs where
the driver shows some that can take work and the engine computes on GPUs, else CPU devices.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, assert_never

import msgspec

from engines.errors import EngineStartFailed, UnsupportedByEngine
from engines.process import usable_cores
from engines.torch_build import has_cpu_torch
from engines.vllm.interpreter import is_cpu_build
from flexpiped.config_values import Auto
from flexpiped.native_interpreter import engine_python
from flexpiped.settings import DevicesKind, EngineKind, Settings
from planner.parameter_cache import default_budget_bytes
from topology.changes import TopologyChange, changes
from topology.device import Device, DeviceKind
from topology.discovery import CpuBudget, Surroundings, discover, discover_cpu
from topology.errors import NotMeasured
from topology.host_memory import host_memory_bytes
from topology.measured import (
    Measurement,
    load_measurement,
    merged,
    parse_measurement,
    save_measurement,
    state_file,
    with_measured,
)
from topology.processes import family_of
from topology.snapshot import to_json
from topology.states import DriverState
from topology.topology import HostTopology
from topology.units import MIB

_UNKNOWN_CPU_MEMORY_BYTES: Final = 512 * MIB  # of a device, where the kernel does not say what there is


def host_topology(
    settings: Settings, *, surroundings: Surroundings | None = None, state: Path | None = None
) -> HostTopology:
    """Return what may hold stages now, by the settings, with measured figures. Blocks for some milliseconds per GPU.

    Args:
        state: The file of measured figures; None for where this user's or service's are kept.

    Raises:
        UnsupportedByEngine: GPUs are asked for, and there are none or the engine does not take them.
    """
    here = surroundings or Surroundings()
    found, refusal = _look(settings, here)
    if settings.devices.kind is DevicesKind.CUDA and refusal is not None:
        raise UnsupportedByEngine(f'devices.kind is "cuda", but {refusal}')
    if refusal is not None and _has_gpus(found):
        found = replace(found, devices=discover_cpu(cpu_budget(settings), surroundings=here).devices, links={})
    measured, _ = _measured(state_file(os.environ, home=Path.home()) if state is None else state)
    return with_measured(found, measured)


def _look(settings: Settings, here: Surroundings) -> tuple[HostTopology, str | None]:
    """Return everything that is here (CPU devices where no GPU takes work), and why stages do not go to GPUs."""
    if settings.devices.kind is DevicesKind.CPU:
        return discover_cpu(cpu_budget(settings), surroundings=here), 'devices.kind is "cpu"'
    found = discover(cpu=cpu_budget(settings), own_pids=family_of(os.getpid()), surroundings=here)
    return found, _refusal(settings) if _has_gpus(found) else _no_gpus(found)


def _has_gpus(host: HostTopology) -> bool:
    return any(device.kind is DeviceKind.CUDA for device in host.devices)


def _measured(state: Path) -> tuple[Measurement | None, str | None]:
    """Return what was measured, or None and why it cannot be read."""
    try:
        return load_measurement(state), None
    except NotMeasured as error:
        return None, str(error)


def devices_in_words(settings: Settings) -> str:
    """Return which devices may hold stages: ``8 CPU devices``, ``2 x NVIDIA L4``. Blocks."""
    try:
        devices = host_topology(settings).devices
    except UnsupportedByEngine:  # whoever needs them says why
        return "no devices"
    names = {device.name for device in devices}
    if all(device.kind is DeviceKind.CPU for device in devices):
        return f"{len(devices)} CPU devices"
    return f"{len(devices)} x {names.pop()}" if len(names) == 1 else f"{len(devices)} GPUs"


def cpu_budget(settings: Settings) -> CpuBudget:
    """Return what each CPU device gets; the threads are its share of the cores while all of them work."""
    threads = settings.engines.native.threads
    cores = usable_cores() if threads is Auto.AUTO else threads
    count, bound = settings.devices.cpu_count, settings.engines.native.threads_per_device
    share = max(1, cores // count)
    own = share if bound is Auto.AUTO else min(bound, share)
    return CpuBudget(count=count, memory_bytes=cpu_memory_bytes(settings), threads=own)


def cpu_memory_bytes(settings: Settings) -> int:
    """Return what one CPU device may hold: as configured, else all of them half of the memory that there is."""
    configured = settings.devices.cpu_memory_bytes
    if configured is not Auto.AUTO:
        return configured
    of_host = host_memory_bytes()
    if of_host is None:
        return _UNKNOWN_CPU_MEMORY_BYTES
    return max(MIB, of_host // 2 // settings.devices.cpu_count)


def parameter_cache_bytes(settings: Settings) -> int:
    """Return what parameters may take of the host's memory when no stage has them.

    As configured; else a quarter of the memory that there is, less where CPU devices and what is to stay free leave
    less.
    """
    configured = settings.devices.parameter_cache_bytes
    if configured is not Auto.AUTO:
        return configured
    of_host = host_memory_bytes()
    if of_host is None:
        return 0
    devices = (
        0 if settings.devices.kind is DevicesKind.CUDA else settings.devices.cpu_count * cpu_memory_bytes(settings)
    )
    return default_budget_bytes(of_host, others_bytes=devices + settings.devices.keep_free_bytes)


def memory_of_one(devices: tuple[Device, ...]) -> int:
    """Return the memory that every device has for us."""
    return min(device.memory_usable_bytes for device in devices)


class Hardware:
    """What ``GET /topology`` answers, and what happens to the hardware while the daemon runs. Every method blocks.

    GPUs are shown also where the engine does not compute on them.

    Args:
        python: The interpreter that has what measuring needs.
        state: The file of measured figures.
    """

    def __init__(
        self, settings: Settings, *, python: str, state: Path | None = None, surroundings: Surroundings | None = None
    ) -> None:
        self._settings = settings
        self._python = python
        self._here = surroundings or Surroundings()
        self._state = state_file(os.environ, home=Path.home()) if state is None else state
        self._last: HostTopology | None = None

    def look(self) -> Mapping[str, Any]:
        """Return the snapshot with measured figures in it, what was measured, and what is odd."""
        host, refusal = _look(self._settings, self._here)
        if refusal is not None and _has_gpus(host):
            notes = (*host.driver.notes, f"stages do not go to GPUs: {refusal}")
            host = replace(host, driver=replace(host.driver, notes=notes))
        measured, problem = _measured(self._state)
        return {
            "topology": msgspec.json.decode(to_json(with_measured(host, measured))),
            "measured_unix_s": None if measured is None else measured.measured_unix_s,
            "measured_how": None if measured is None else measured.how,
            "problem": problem,
            "python": self._python,
        }

    def devices(self) -> tuple[Device, ...]:
        """Return the devices of this host as they are now."""
        return _look(self._settings, self._here)[0].devices

    @property
    def may_change(self) -> bool:
        """Whether it is worth looking again: not where no driver was found."""
        quiet = (DriverState.NOT_ASKED, DriverState.NO_LIBRARY)
        return self._last is None or self._last.driver.state not in quiet

    def news(self) -> tuple[TopologyChange, ...]:
        """Look, and return what is different from the time before; nothing the first time."""
        before, (self._last, _) = self._last, _look(self._settings, self._here)
        return () if before is None else changes(before, self._last)

    def keep(self, text: bytes) -> str:
        """Keep a measurement that somebody made; return the file. Raises ``NotMeasured``."""
        return str(keep_measurement(self._state, parse_measurement(text, file="measurement")))


def keep_measurement(state: Path, new: Measurement) -> Path:
    """Put a measurement beside what was kept before. Raises ``NotMeasured``."""
    try:
        old = load_measurement(state)
    except NotMeasured:  # what cannot be read is replaced
        old = None
    save_measurement(state, merged(old, new))
    return state


def _refusal(settings: Settings) -> str | None:
    """Return why the engine does not compute on GPUs, or None."""
    match settings.engine:
        case EngineKind.VLLM:
            python = settings.engines.vllm.python
            return f"{python} has vLLM built for the CPU" if python is not None and is_cpu_build(python) else None
        case EngineKind.SGLANG:
            python = settings.engines.sglang.python
            return f"{python} has torch built for the CPU" if python is not None and has_cpu_torch(python) else None
        case EngineKind.NATIVE:
            return _no_cuda_torch(settings)
        case EngineKind.FAKE:
            return "the fake engine computes nothing"
        case _:
            assert_never(settings.engine)


def _no_cuda_torch(settings: Settings) -> str | None:
    try:
        python = engine_python(settings)
    except EngineStartFailed as error:
        return str(error)
    return f"{python} has torch built for the CPU" if has_cpu_torch(Path(python)) else None


def _no_gpus(host: HostTopology) -> str:
    unfit = [f"{gpu.uuid}: {gpu.health.sentence or gpu.health.state.value}" for gpu in host.gpus]
    reasons = [host.driver.sentence, *host.driver.unreadable, *host.driver.notes, *unfit]
    return "no GPU can take work: " + "; ".join(reason for reason in reasons if reason)
