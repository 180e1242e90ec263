"""The openb cluster: tasks on its GPUs, and what changes after its busiest moment."""

import pytest

from planner.errors import InvalidTrace
from planner.simulation.openb import Node, UseChange, fill, nodes_of, replay_to_peak, tasks_of

NODES = "sn,cpu_milli,memory_mib,gpu,model\nn0,1,1,2,T4\nn1,1,1,1,T4\n"
PODS = "num_gpu,gpu_milli,creation_time,deletion_time\n"


def stand(*rows: str, then_s: int = 0) -> tuple[list[Node], list[UseChange]]:
    nodes = nodes_of(NODES)
    return nodes, replay_to_peak(nodes, tasks_of(PODS + "\n".join(rows)), then_s=then_s)


def test_tasks_at_the_peak_are_placed() -> None:
    nodes, changes = stand("1,300,0,100", "1,400,10,100", "2,1000,20,100", "1,1000,200,300")

    assert sorted(used for node in nodes for used in node.used) == [700, 1000, 1000]
    assert changes == []


def test_what_changes_after_the_peak() -> None:
    nodes, changes = stand("1,1000,0,50", "1,600,0,500", "1,200,60,80", then_s=100)

    assert sorted(used for node in nodes for used in node.used) == [0, 600, 1000]
    assert [(each.at_s, each.thousandths) for each in changes] == [(50, -1000), (60, 200), (80, -200)]


def test_tasks_fill_up_to_a_load() -> None:
    nodes = nodes_of(NODES)
    fill(nodes, tasks_of(PODS + "1,250,0,1"), load=0.5)

    assert sum(sum(node.used) for node in nodes) == 1500


@pytest.mark.parametrize("text", ["", "sn,model\nn0,T4\n", "sn,gpu,model\nn0,two,T4\n"])
def test_what_is_no_node_list(text: str) -> None:
    with pytest.raises(InvalidTrace, match="nodes"):
        nodes_of(text)


def test_what_is_no_pod_list() -> None:
    with pytest.raises(InvalidTrace, match="pods"):
        tasks_of("num_gpu,gpu_milli\n1,5\n")
