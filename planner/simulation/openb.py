"""The openb cluster (1,213 nodes, 6,212 GPUs) with the tasks of its trace on it: what is left of each GPU, and when.

Data: alibaba/clusterdata, cluster-trace-gpu-v2023 (Weng et al., USENIX ATC 2023). Text in, no files. The models G2 and
G3 are anonymous in the trace: here they are taken for 24 GiB and 80 GiB cards.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, cycle

from planner.errors import InvalidTrace
from topology.units import GIB

WHOLE = 1000  # thousandths of a GPU
_MOST_MISSES = 1000

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


@dataclass(frozen=True, slots=True, kw_only=True)
class UseChange:
    """From ``at_s`` after the peak on, a GPU is used ``thousandths`` more, or less."""

    at_s: int
    node: str
    gpu: int
    thousandths: int


def nodes_of(text: str) -> list[Node]:
    """Return the nodes of a node list, empty. Raises: InvalidTrace."""
    try:
        rows = csv.DictReader(text.splitlines())
        nodes = [Node(name=row["sn"], model=row["model"], used=[0] * int(row["gpu"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidTrace(f"this is no list of openb nodes: {error}") from None
    if not nodes:
        raise InvalidTrace("the list of openb nodes has none")
    return nodes


def tasks_of(text: str) -> list[Task]:
    """Return the tasks of a pod list that ask for a GPU, in the order of their creation. Raises: InvalidTrace."""
    try:
        tasks = [
            Task(
                num_gpus=int(row["num_gpu"]),
                share=int(row["gpu_milli"]),
                created_s=int(row["creation_time"]),
                deleted_s=int(row["deletion_time"]),
            )
            for row in csv.DictReader(text.splitlines())
            if int(row["num_gpu"]) > 0
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidTrace(f"this is no list of openb pods: {error}") from None
    return sorted(tasks, key=lambda task: task.created_s)


def peak_s(tasks: Sequence[Task]) -> int:
    """Return the moment of the trace at which its tasks ask for the most GPUs."""
    changes = sorted(
        [(task.deleted_s, -task.num_gpus * task.share) for task in tasks]
        + [(task.created_s, task.num_gpus * task.share) for task in tasks]
    )
    return max(zip(accumulate(change for _, change in changes), changes, strict=True))[1][0]


def replay_to_peak(nodes: Sequence[Node], tasks: Sequence[Task], *, then_s: int = 0) -> list[UseChange]:
    """Place on empty nodes what runs at the peak; return what changes within ``then_s`` after it."""
    at_s = peak_s(tasks)
    scheduler = Scheduler(nodes)
    here = [
        (task, places)
        for task in tasks
        if task.created_s <= at_s < task.deleted_s and (places := scheduler.place(task))
    ]
    before = {(node.name, gpu): used for node in nodes for gpu, used in enumerate(node.used)}
    changes = _changes(scheduler, tasks, here, at_s=at_s, until_s=at_s + then_s)
    for node in nodes:  # as it is at the peak
        node.used = [before[node.name, gpu] for gpu in range(len(node.used))]
    return changes


def _changes(
    scheduler: "Scheduler",
    tasks: Sequence[Task],
    here: list[tuple[Task, list[tuple[Node, int]]]],
    *,
    at_s: int,
    until_s: int,
) -> list[UseChange]:
    found: list[UseChange] = []

    def tell(when_s: int, task: Task, places: list[tuple[Node, int]], sign: int) -> None:
        found.extend(
            UseChange(at_s=when_s - at_s, node=node.name, gpu=gpu, thousandths=sign * task.share)
            for node, gpu in places
        )

    def end_until(when_s: int) -> None:
        for each in sorted((e for e in here if e[0].deleted_s <= when_s), key=lambda e: e[0].deleted_s):
            here.remove(each)
            scheduler.release(*each)
            tell(each[0].deleted_s, each[0], each[1], -1)

    for task in tasks:
        if at_s < task.created_s <= until_s:
            end_until(task.created_s)
            if places := scheduler.place(task):
                here.append((task, places))
                tell(task.created_s, task, places, +1)
    end_until(until_s)
    return found


def fill(nodes: Sequence[Node], tasks: Sequence[Task], *, load: float) -> None:
    """Place tasks on empty nodes, again from the first where they end, up to a share of all GPUs."""
    wanted = int(load * WHOLE * sum(len(node.used) for node in nodes))
    scheduler, misses = Scheduler(nodes), 0
    for task in cycle(tasks):
        if scheduler.total >= wanted or misses > _MOST_MISSES:
            return
        misses = 0 if scheduler.place(task) else misses + 1


class Scheduler:
    """Best fit: a share goes to the fullest GPU that has room, whole GPUs to the node with the fewest that are free."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.total = 0
        self._by_left: list[list[tuple[Node, int]]] = [[] for _ in range(WHOLE + 1)]
        self._nodes = nodes
        for node in nodes:
            self._by_left[WHOLE].extend((node, gpu) for gpu in range(len(node.used)))

    def place(self, task: Task) -> list[tuple[Node, int]]:
        """Place a task; return where, nothing where there was no room."""
        found = list(self._whole(task)) if task.num_gpus > 1 or task.share == WHOLE else self._part(task.share)
        if len(found) < task.num_gpus:
            return []
        places = found[: task.num_gpus]
        for node, gpu in places:
            self._use(node, gpu, task.share)
        return places

    def release(self, task: Task, places: Sequence[tuple[Node, int]]) -> None:
        """Take a task off its GPUs."""
        for node, gpu in places:
            self._use(node, gpu, -task.share)

    def _use(self, node: Node, gpu: int, share: int) -> None:
        left = WHOLE - node.used[gpu]
        self._by_left[left].remove((node, gpu))
        node.used[gpu] += share
        self._by_left[left - share].append((node, gpu))
        self.total += share

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
