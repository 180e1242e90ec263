"""``flexctl topology --measure``: has the engine's side measure every pair of devices, and shows how far it is."""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Final

from engines.process import import_root
from flexpiped.flexctl.terminal import Screen
from topology.cuda_order import visible_environment
from topology.device import Device, DeviceKind
from topology.errors import NotMeasured
from topology.measured import MeasuredPair, Measurement
from topology.topology import HostTopology

_MOST_DEVICES_OF_ALL_PAIRS: Final = 16  # 120 pairs: some ten seconds
_SAY_AFTER_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured, by which program, with which variables."""

    module: str
    how: str
    device_ids: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    environment: dict[str, str]
    notes: tuple[str, ...] = ()


def plan(host: HostTopology) -> Plan:
    """Return what to measure on a host: all pairs, or those next to each other where there are too many.

    Raises:
        NotMeasured: There is no pair.
    """
    if any(device.kind is DeviceKind.CUDA for device in host.devices):
        return _gpu_plan(host)
    return _with_pairs(
        host.devices,
        module="engines.native.measure_links",
        how="shared memory, as KV cache moves between stage workers",
        environment={},
        notes=(),
    )


def _gpu_plan(host: HostTopology) -> Plan:
    whole = [device for device in host.devices if device.kind is DeviceKind.CUDA and not device.id.startswith("MIG-")]
    notes: tuple[str, ...] = ("GPU measurements are new: they have not been run on GPUs before",)
    if len(whole) < len(host.devices):
        notes = (*notes, "MIG instances are left out: a process sees one of them at most")
    return _with_pairs(
        whole,
        module="engines.native.measure_gpus",
        how="copies by torch from GPU to GPU",
        environment=visible_environment([device.id for device in whole]),
        notes=notes,
    )


def _with_pairs(
    devices: Sequence[Device], *, module: str, how: str, environment: dict[str, str], notes: tuple[str, ...]
) -> Plan:
    ids = tuple(device.id for device in devices)
    if len(ids) < 2:
        raise NotMeasured("there is no pair of devices to measure")
    pairs = tuple(combinations(ids, 2))
    if len(ids) > _MOST_DEVICES_OF_ALL_PAIRS:
        pairs = tuple(pairwise(ids))
        notes = (*notes, f"{len(ids)} devices: only neighbours were measured, the other pairs were not")
    return Plan(module=module, how=how, device_ids=ids, pairs=pairs, environment=environment, notes=notes)


def measure(host: HostTopology, what: Plan, *, python: str, screen: Screen) -> Measurement:
    """Measure; on a terminal the pair just done is shown, in a pipe nothing.

    Raises:
        NotMeasured: The program cannot be run or failed; the message has its last words.
    """
    began_s, found = time.monotonic(), []
    for pair in _results(what, python):
        found.append(pair)
        if time.monotonic() - began_s > _SAY_AFTER_S:
            screen.live(
                f"measuring  {len(found)} of {len(what.pairs)} pairs   {pair.a} to {pair.b}: "
                f"{pair.bandwidth_bytes_per_s / 1e9:.1f} GB/s, {pair.latency_s * 1e6:.0f} us"
            )
    return Measurement(host_id=host.host_id, measured_unix_s=time.time(), how=what.how, pairs=tuple(found))


def _results(what: Plan, python: str) -> Iterator[MeasuredPair]:
    request = json.dumps({"device_ids": what.device_ids, "pairs": what.pairs})
    try:
        process = subprocess.Popen(
            [python, "-m", what.module, request],
            env={**os.environ, "PYTHONPATH": str(import_root()), **what.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        raise NotMeasured(f"cannot run {python}: {error.strerror}") from None
    with process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                yield MeasuredPair(**json.loads(line))
            words = process.stderr.read().strip().splitlines()
        finally:
            process.kill()
    if process.returncode:
        raise NotMeasured(f"measuring failed: {words[-1] if words else f'exit status {process.returncode}'}")
