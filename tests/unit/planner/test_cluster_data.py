"""The planner on the openb cluster, where its data is at hand (``FLEXPIPED_CLUSTER_DATA``)."""

import time

import pytest

from planner.budget import Budget
from planner.checker import check
from planner.placement_solver import place
from tests.bench.openb import at_load, data_folder, read_nodes
from tests.bench.placement_instances import OPT_66B, placement

FOLDER = data_folder()


@pytest.mark.skipif(FOLDER is None, reason="FLEXPIPED_CLUSTER_DATA names no folder with the openb trace")
def test_a_loaded_cluster_has_a_proven_plan() -> None:
    assert FOLDER is not None
    assert sum(len(node.used) for node in read_nodes(FOLDER)) == 6212
    problem = placement(at_load(FOLDER, 0.8), OPT_66B.pieces(1), stages=16, min_kv_tokens=4096)
    found = place(problem, budget=Budget(limit_s=60.0, clock=time.monotonic))
    assert check(problem, found) == ()
    assert found.proofs[0].proven
