"""What this host offers to the daemon: devices by the configuration and by what is here, with what was measured.

``devices.kind`` decides: "cpu" asks no driver; "cuda" wants GPUs and says why there are none; "auto" takes GPUs where
the driver shows some that can take work and the engine computes on GPUs, else CPU devices.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from engines.errors import UnsupportedByEngine
from engines.process import usable_cores
from engines.vllm.interpreter import is_cpu_build
from flexpiped.config_values import Auto
from flexpiped.settings import DevicesKind, EngineKind, Settings
from topology.device import Device, DeviceKind
from topology.discovery import CpuBudget, Surroundings, discover, discover_cpu
from topology.errors import NotMeasured
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
from topology.states import DriverStatus
from topology.topology import HostTopology

_CPU_ONLY: Final = {
    EngineKind.NATIVE: "the native engine computes on CPU devices",
    EngineKind.FAKE: "the fake engine computes nothing",
}


def host_topology(settings: Settings, *, surroundings: Surroundings | None = None) -> HostTopology:
    """Return what this host offers now, by the settings. Blocks for some milliseconds per GPU.

    Raises:
        UnsupportedByEngine: GPUs are asked for, and there are none or the engine does not take them.
    """
    here = surroundings or Surroundings()
    budget = cpu_budget(settings)
    if settings.devices.kind is DevicesKind.CPU:
        return discover_cpu(budget, surroundings=here)
    found = discover(cpu=budget, own_pids=family_of(os.getpid()), surroundings=here)
    has_gpus = any(device.kind is DeviceKind.CUDA for device in found.devices)
    refusal = _refusal(settings) if has_gpus else _no_gpus(found)
    if refusal is None:
        return found
    if settings.devices.kind is DevicesKind.CUDA:
        raise UnsupportedByEngine(f'devices.kind is "cuda", but {refusal}')
    if not has_gpus:
        return found
    cpu = discover_cpu(budget, surroundings=here)
    return replace(found, devices=cpu.devices, links={}, driver=_with_note(found, f"GPUs are not used: {refusal}"))


def devices_in_words(settings: Settings) -> tuple[int, str]:
    """Return how many devices may hold stages, and what they are: ``8 CPU devices``, ``2 x NVIDIA L4``. Blocks."""
    try:
        devices = host_topology(settings).devices
    except UnsupportedByEngine:  # whoever needs them says why
        return 0, "no devices"
    names = {device.name for device in devices}
    if all(device.kind is DeviceKind.CPU for device in devices):
        return len(devices), f"{len(devices)} CPU devices"
    return len(devices), f"{len(devices)} x {names.pop()}" if len(names) == 1 else f"{len(devices)} GPUs"


def cpu_budget(settings: Settings) -> CpuBudget:
    """Return what each CPU device gets; the threads are its share of the cores while all of them work."""
    threads = settings.engines.native.threads
    cores = usable_cores() if threads is Auto.AUTO else threads
    count = settings.devices.cpu_count
    return CpuBudget(count=count, memory_bytes=settings.devices.cpu_memory_bytes, threads=max(1, cores // count))


def memory_of_one(devices: tuple[Device, ...]) -> int:
    """Return the memory that every device has for us."""
    return min(device.memory_usable_bytes for device in devices)


class Hardware:
    """What ``GET /topology`` answers: looked at anew each time. Every method blocks.

    Args:
        python: The interpreter that has what measuring needs.
        state: The file of measured figures.
    """

    def __init__(
        self, settings: Settings, *, python: str, state: Path | None = None, surroundings: Surroundings | None = None
    ) -> None:
        self._settings = settings
        self._python = python
        self._surroundings = surroundings
        self._state = state_file(os.environ, home=Path.home()) if state is None else state

    def look(self) -> Mapping[str, Any]:
        """Return the snapshot with measured figures in it, what was measured, and what is odd."""
        host = host_topology(self._settings, surroundings=self._surroundings)
        try:
            measured, problem = load_measurement(self._state), None
        except NotMeasured as error:
            measured, problem = None, str(error)
        return {
            "topology": msgspec.json.decode(to_json(with_measured(host, measured))),
            "measured_unix_s": None if measured is None else measured.measured_unix_s,
            "measured_how": None if measured is None else measured.how,
            "problem": problem,
            "python": self._python,
        }

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
    if settings.engine is not EngineKind.VLLM:
        return _CPU_ONLY[settings.engine]
    python = settings.engines.vllm.python
    if python is not None and is_cpu_build(python):
        return f"{python} has vLLM built for the CPU"
    return None


def _no_gpus(host: HostTopology) -> str:
    unfit = [f"{gpu.uuid}: {gpu.health.sentence or gpu.health.state.value}" for gpu in host.gpus]
    reasons = [host.driver.sentence, *host.driver.unreadable, *host.driver.notes, *unfit]
    return "no GPU can take work: " + "; ".join(reason for reason in reasons if reason)


def _with_note(host: HostTopology, note: str) -> DriverStatus:
    return replace(host.driver, notes=(*host.driver.notes, note))
