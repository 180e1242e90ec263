"""The openb cluster (1,213 nodes, 6,212 GPUs) with the tasks of its trace on it: what is left of each GPU.

Data: alibaba/clusterdata, cluster-trace-gpu-v2023 (Weng et al., USENIX ATC 2023). ``FLEXPIPED_CLUSTER_DATA`` names the
folder with ``openb_node_list_gpu_node.csv`` and ``openb_pod_list_default.csv``; the repository ships neither. The
models G2 and G3 are anonymous in the trace: here they are taken for 24 GiB and 80 GiB cards.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, cycle
from pathlib import Path

from topology.units import GIB

WHOLE = 1000  # thousandths of a GPU
NODES, PODS = "openb_node_list_gpu_node.csv", "openb_pod_list_default.csv"

# memory in GiB and bandwidth in GB/s of each model of the trace
CARDS = {
    "G3": (80, 2000),
    "V100M32": (32, 900),
    "V100M16": (16, 900),
    "G2": (24, 600),
    "A10": (24, 600),
    "P100": (16, 732),
    "T4": (16, 320),
}


@dataclass(slots=True, kw_only=True)
class Node:
    """A host with its GPUs; ``used`` is what tasks take of each, in thousandths."""

    name: str
    model: str
    used: list[int] = field(default_factory=list)

    def free_bytes(self, gpu: int) -> int:
        """Return the memory that tasks leave on a GPU."""
        return CARDS[self.model][0] * GIB * (WHOLE - self.used[gpu]) // WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a pod of the trace asks for: a share of one GPU, or whole GPUs of one node."""

    num_gpus: int
    share: int
    created_s: int
    deleted_s: int


def data_folder() -> Path | None:
    """Return the folder with the trace, None where there is none."""
    named = os.environ.get("FLEXPIPED_CLUSTER_DATA", "")
    folder = Path(named) if named else None
    return folder if folder is not None and (folder / NODES).exists() and (folder / PODS).exists() else None


def read_nodes(folder: Path) -> list[Node]:
    """Return the nodes, empty."""
    with (folder / NODES).open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [Node(name=row["sn"], model=row["model"], used=[0] * int(row["gpu"])) for row in rows]


def read_tasks(folder: Path) -> list[Task]:
    """Return the tasks that ask for a GPU, in the order of their creation."""
    with (folder / PODS).open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if int(row["num_gpu"]) > 0]
    tasks = [
        Task(
            num_gpus=int(row["num_gpu"]),
            share=int(row["gpu_milli"]),
            created_s=int(row["creation_time"]),
            deleted_s=int(row["deletion_time"]),
        )
        for row in rows
    ]
    return sorted(tasks, key=lambda task: task.created_s)


def replayed(folder: Path) -> list[Node]:
    """Return the nodes at the moment of the trace at which its tasks ask for the most GPUs."""
    nodes, tasks = read_nodes(folder), read_tasks(folder)
    changes = sorted(
        [(task.deleted_s, -task.num_gpus * task.share) for task in tasks]
        + [(task.created_s, task.num_gpus * task.share) for task in tasks]
    )
    peak_s = max(zip(accumulate(change for _, change in changes), changes, strict=True))[1][0]
    placed = _Scheduler(nodes)
    for task in tasks:
        if task.created_s <= peak_s < task.deleted_s:
            placed.place(task)
    return nodes


def at_load(folder: Path, load: float) -> list[Node]:
    """Return the nodes with tasks of the trace, again from its beginning where it ends, up to a share of all GPUs."""
    nodes = read_nodes(folder)
    wanted = int(load * WHOLE * sum(len(node.used) for node in nodes))
    placed, misses = _Scheduler(nodes), 0
    for task in cycle(read_tasks(folder)):
        if placed.total >= wanted or misses > 1000:
            return nodes
        misses = 0 if placed.place(task) else misses + 1
    return nodes


class _Scheduler:
    """Best fit: a share goes to the fullest GPU that has room, whole GPUs to the node with the fewest that are free."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.total = 0
        self._by_left: list[list[tuple[Node, int]]] = [[] for _ in range(WHOLE + 1)]
        self._nodes = nodes
        for node in nodes:
            self._by_left[WHOLE].extend((node, gpu) for gpu in range(len(node.used)))

    def place(self, task: Task) -> bool:
        """Place a task; return whether there was room."""
        found = list(self._whole(task)) if task.num_gpus > 1 or task.share == WHOLE else self._part(task.share)
        if len(found) < task.num_gpus:
            return False
        for node, gpu in found[: task.num_gpus]:
            left = WHOLE - node.used[gpu]
            self._by_left[left].remove((node, gpu))
            node.used[gpu] += task.share
            self._by_left[left - task.share].append((node, gpu))
            self.total += task.share
        return True

    def _part(self, share: int) -> list[tuple[Node, int]]:
        return next(([found[-1]] for found in self._by_left[share:] if found), [])

    def _whole(self, task: Task) -> Iterator[tuple[Node, int]]:
        free = {
            id(node): [gpu for gpu, used in enumerate(node.used) if used == 0]
            for node in self._nodes
            if len(node.used) >= task.num_gpus
        }
        fitting = [node for node in self._nodes if len(free.get(id(node), ())) >= task.num_gpus]
        if fitting:
            best = min(fitting, key=lambda node: len(free[id(node)]))
            yield from ((best, gpu) for gpu in free[id(best)])
