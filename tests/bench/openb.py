"""The files of the openb cluster, which the repository does not ship; what is in them: ``planner.simulation.openb``.

``FLEXPIPED_CLUSTER_DATA`` names the folder with ``openb_node_list_gpu_node.csv`` and ``openb_pod_list_default.csv``
(alibaba/clusterdata, cluster-trace-gpu-v2023; Weng et al., USENIX ATC 2023).
"""

import os
from pathlib import Path

from planner.simulation.openb import CARDS, WHOLE, Node, Task, fill, nodes_of, replay_to_peak, tasks_of

__all__ = ["CARDS", "WHOLE", "Node", "Task", "at_load", "data_folder", "read_nodes", "read_tasks", "replayed"]

NODES, PODS = "openb_node_list_gpu_node.csv", "openb_pod_list_default.csv"


def data_folder() -> Path | None:
    """Return the folder with the trace, None where there is none."""
    named = os.environ.get("FLEXPIPED_CLUSTER_DATA", "")
    folder = Path(named) if named else None
    return folder if folder is not None and (folder / NODES).exists() and (folder / PODS).exists() else None


def read_nodes(folder: Path) -> list[Node]:
    """Return the nodes, empty."""
    return nodes_of((folder / NODES).read_text())


def read_tasks(folder: Path) -> list[Task]:
    """Return the tasks that ask for a GPU, in the order of their creation."""
    return tasks_of((folder / PODS).read_text())


def replayed(folder: Path) -> list[Node]:
    """Return the nodes at the moment of the trace at which its tasks ask for the most GPUs."""
    nodes = read_nodes(folder)
    replay_to_peak(nodes, read_tasks(folder))
    return nodes


def at_load(folder: Path, load: float) -> list[Node]:
    """Return the nodes with tasks of the trace, again from its beginning where it ends, up to a share of all GPUs."""
    nodes = read_nodes(folder)
    fill(nodes, read_tasks(folder), load=load)
    return nodes
