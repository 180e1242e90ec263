"""What is simulated: devices and replicas, from files or from OPT-66B's published table."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from flexpiped.offline_plan import OfflineRequest, measured_starts, offline_question
from planner.candidate_plan import Found, Verdict
from planner.errors import InvalidTrace, NoFeasiblePlan
from planner.planning import plan
from planner.question import PlanQuestion
from planner.simulation import opt_66b
from planner.simulation.cluster import hosts_of, occupied_devices
from planner.simulation.openb import WHOLE, Node, UseChange, nodes_of, replay_to_peak, tasks_of
from planner.simulation.pool import DevicePool, PoolDevice
from planner.simulation.run import MemoryChange
from planner.simulation.shape import Shape, Shapes
from planner.stage_times import pipeline_times
from planner.start_times import Origin, StartRecord, expected_start_s, expected_trial_s
from planner.workload import Slo, Workload
from topology.units import format_bytes, plural

NODES, PODS = "openb_node_list_gpu_node.csv", "openb_pod_list_default.csv"
_STORAGE_BYTES_PER_S: Final = 1e9  # one host reads its stages from local disks at about this rate
_HOST_MEMORY_BYTES_PER_S: Final = 20e9  # PCIe 4.0 x16
_PROCESS_S: Final = 1.0
_IN_MEMORY: Final = (Origin.KEPT, Origin.PAGE_CACHE)  # of the host: what a warm start is
_PAUSE_S: Final = 0.010  # commit pauses here are 2 to 7 ms
_SPREAD_SHARES: Final = (0.1, 0.2, 0.3, 0.5)  # of neighbours' tasks where no cluster file says


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Shapes, and the devices as they are at the beginning. ``source``: where the times come from, for people."""

    shapes: Shapes
    devices: tuple[PoolDevice, ...]
    memory_changes: tuple[MemoryChange, ...]
    source: str

    def pool(self) -> DevicePool:
        """Return the devices, each time anew: a simulation changes them."""
        return DevicePool(devices=[replace(each) for each in self.devices])


def published(*, devices: int, hosts: int, occupancy: float, cluster: str, duration_s: float, seed: int) -> Scenario:
    """Return OPT-66B on 80-GB cards, with neighbours as in an openb cluster file, or drawn.

    Raises:
        InvalidTrace: The cluster file cannot be read, or has too few GPUs.
        NoFeasiblePlan: No replica fits, and no neighbour leaves.
    """
    if cluster:
        found, changes = _openb(Path(cluster), count=devices, duration_s=duration_s, seed=seed)
    else:
        found, changes = (
            occupied_devices(
                hosts_of(devices=devices, hosts=hosts),
                total_bytes=opt_66b.DEVICE_BYTES,
                shares=_SPREAD_SHARES,
                occupancy=occupancy,
                seed=seed,
            ),
            [],
        )
    scenario = Scenario(
        shapes=opt_66b.shapes(),
        devices=tuple(found),
        memory_changes=tuple(changes),
        source="OPT-66B as FlexPipe's table has it",
    )
    _ensure_room(scenario)
    return scenario


def _ensure_room(scenario: Scenario) -> None:
    pool = scenario.pool()
    if scenario.memory_changes or any(pool.room_for(shape) for shape in scenario.shapes.values()):
        return
    needs = ", ".join(
        f"{count} devices with {format_bytes(shape.least_bytes)} free"
        for count, shape in sorted(scenario.shapes.items())
    )
    free = format_bytes(max(each.free_bytes for each in scenario.devices))
    there = f"{plural(len(scenario.devices), 'device')} with {free} free at most"
    raise NoFeasiblePlan(f"no replica fits on {there}; one needs {needs}")


def _openb(folder: Path, *, count: int, duration_s: float, seed: int) -> tuple[list[PoolDevice], list[MemoryChange]]:
    """Return GPUs of whole nodes of the cluster at its busiest, each taken for an 80-GB card, and what changes then."""
    try:
        nodes, tasks = nodes_of((folder / NODES).read_text()), tasks_of((folder / PODS).read_text())
    except OSError as error:
        raise InvalidTrace(f"{error.filename}: {error.strerror}") from None
    changes = replay_to_peak(nodes, tasks, then_s=int(duration_s))
    random.Random(seed).shuffle(nodes)
    gpus = [(node, gpu) for node in nodes for gpu in range(len(node.used))][:count]
    if len(gpus) < count:
        raise InvalidTrace(f"{folder}: has {len(gpus)} GPUs, {count} are asked for")
    return _devices(gpus), _memory_changes(gpus, changes)


def _devices(gpus: list[tuple[Node, int]]) -> list[PoolDevice]:
    total = opt_66b.DEVICE_BYTES
    return [
        PoolDevice(index=index, host=node.name, total_bytes=total, others_bytes=total * node.used[gpu] // WHOLE)
        for index, (node, gpu) in enumerate(gpus)
    ]


def _memory_changes(gpus: list[tuple[Node, int]], changes: list[UseChange]) -> list[MemoryChange]:
    index_of = {(node.name, gpu): index for index, (node, gpu) in enumerate(gpus)}
    return [
        MemoryChange(
            at_s=float(each.at_s),
            device=index_of[each.node, each.gpu],
            num_bytes=opt_66b.DEVICE_BYTES * each.thousandths // WHOLE,
        )
        for each in changes
        if (each.node, each.gpu) in index_of
    ]


def planned(request: OfflineRequest, *, workload: Workload, slo: Slo, clock: Callable[[], float]) -> Scenario:
    """Return the granularities that the planner finds for a model on a topology, each with its first pipeline's times.

    Raises:
        NoFeasiblePlan: Nothing fits.
        As ``offline_plan``.
    """
    question = replace(offline_question(request), workload=workload, slo=slo, max_replicas=1)
    answer = plan(question, clock=clock)
    starts = measured_starts(request)
    shapes = {
        each.num_stages: _shape(question, each.found, starts)
        for each in answer.candidates
        if each.found is not None and each.degree == 1 and each.verdict in (Verdict.CHOSEN, Verdict.LOST)
    }
    if not shapes:
        raise NoFeasiblePlan(answer.reason)
    devices = [
        PoolDevice(
            index=index,
            host=device.host_id or "host",
            total_bytes=device.memory_total_bytes,
            others_bytes=device.memory_reserved_bytes,
        )
        for index, device in enumerate(question.topology.devices)
    ]
    source = f"{question.costs.source}; start times as {'measured' if starts else 'estimated'}"
    return Scenario(shapes=shapes, devices=tuple(devices), memory_changes=(), source=source)


def _shape(question: PlanQuestion, found: Found, starts: Sequence[StartRecord]) -> Shape:
    pipeline = found.pipelines[0]
    largest = max(found.memory, key=lambda each: each.needed_bytes)
    weight_bytes = largest.weight_bytes + largest.workspace_bytes
    load_s = largest.weight_bytes / _HOST_MEMORY_BYTES_PER_S
    cold_s, warm_s = start_times(starts, num_stages=pipeline.granularity, weight_bytes=largest.weight_bytes)
    return Shape(
        num_stages=pipeline.granularity,
        times=pipeline_times(question, pipeline, kv_tokens=found.kv_tokens),
        stage_weight_bytes=weight_bytes,
        stage_kv_bytes_per_token=largest.kv_bytes / max(1, found.kv_tokens),
        min_kv_tokens=min(found.kv_tokens, int(4 * question.workload.sequence_tokens_mean) + 1),
        cold_s=cold_s,
        warm_s=warm_s,
        prepare_s=load_s,
        pause_s=_PAUSE_S,
    )


def start_times(starts: Sequence[StartRecord], *, num_stages: int, weight_bytes: int) -> tuple[float, float]:
    """Return how long a replica starts, cold and warm: as measured; what was not is estimated from what was, or all.

    A start that was only measured warm takes what storage takes longer than memory, when it is cold.
    """
    from_storage_s, from_memory_s = weight_bytes / _STORAGE_BYTES_PER_S, weight_bytes / _HOST_MEMORY_BYTES_PER_S
    warm_s, cold_s = (_measured_s(starts, num_stages, origins) for origins in (_IN_MEMORY, (Origin.STORAGE,)))
    if warm_s is None:
        warm_s = from_memory_s + _PROCESS_S if cold_s is None else max(0.0, cold_s - from_storage_s + from_memory_s)
    return (warm_s + from_storage_s - from_memory_s if cold_s is None else cold_s), warm_s


def _measured_s(starts: Sequence[StartRecord], num_stages: int, origins: Sequence[Origin]) -> float | None:
    """Return what a replica took to start from the first of these origins that was measured, and to be tried out."""
    found = (expected_start_s(starts, num_stages=num_stages, origin=origin) for origin in origins)
    start_s = next((each for each in found if each is not None), None)
    return None if start_s is None else start_s + expected_trial_s(starts)


def describe(scenario: Scenario) -> Mapping[str, str]:
    """Return what is simulated, for people."""
    total = sum(each.total_bytes for each in scenario.devices)
    taken = sum(each.others_bytes for each in scenario.devices)
    hosts = len({each.host for each in scenario.devices})
    return {
        "devices": f"{len(scenario.devices)} on {hosts} hosts, neighbours hold {taken / total:.0%} of their memory",
        "granularities": ", ".join(map(str, sorted(scenario.shapes))) + " stages",
        "times": scenario.source,
    }
