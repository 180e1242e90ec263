"""Cuts against brute force, and why a number of stages cannot fit."""

import random
from itertools import combinations

import pytest

from planner.partition import (
    StageCosts,
    even_cuts,
    piece_bounds,
    stage_costs,
    stage_limit_sentence,
    unevenness,
    why_too_big,
)
from planner.plan import PlanRequest
from tests.support.graphs import SMALL_GPT2, graph_of, weighted_graph
from topology.device import cpu_devices
from topology.units import MIB


@pytest.mark.parametrize("seed", range(200))
def test_even_cuts_equal_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 9)
    costs = StageCosts(
        pieces=tuple(rng.randint(1, 12) for _ in range(count)),
        first=rng.choice([0, 3, 20]),
        last=rng.choice([0, 3, 20]),
        fixed=rng.choice([0, 5]),
    )
    stages = rng.randint(1, count)
    sizes = [costs.bytes_of_cuts(cuts) for cuts in combinations(range(1, count), stages - 1)]
    best = min((max(size), unevenness(size)) for size in sizes)
    found = costs.bytes_of_cuts(even_cuts(costs, stages))
    assert len(found) == stages
    assert (max(found), unevenness(found)) == best
    assert sum(found) == costs.total_bytes + stages * costs.fixed


def test_equal_decoders_are_cut_equally() -> None:
    costs = StageCosts(pieces=(10,) * 8, first=1, last=1)
    assert even_cuts(costs, 1) == ()
    assert even_cuts(costs, 2) == (4,)
    assert even_cuts(costs, 4) == (2, 4, 6)
    assert even_cuts(costs, 8) == (1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("stages", [0, 9])
def test_more_stages_than_pieces_cannot_be(stages: int) -> None:
    with pytest.raises(ValueError, match="8 pieces cannot be cut"):
        even_cuts(StageCosts(pieces=(1,) * 8), stages)


def test_costs_count_weights_kv_and_ends() -> None:
    graph = graph_of(SMALL_GPT2)
    request = PlanRequest(
        graph=graph, devices=cpu_devices(count=2, memory_bytes=MIB), kv_bytes_per_decoder=1000, workspace_bytes=50
    )
    two, one = stage_costs(request, 2), stage_costs(request, 1)
    assert two.pieces == tuple(layer.weight_bytes + 1000 for layer in graph.decoders)
    assert (two.first, two.last, two.fixed) == (graph.embedding.weight_bytes, graph.head.weight_bytes, 50)
    assert one.total_bytes == two.total_bytes - graph.shared_bytes
    assert one.total_bytes == graph.total_weight_bytes + 4 * 1000
    assert piece_bounds(graph) == (0, 1, 2, 3, 4)


def test_why_too_big_has_the_numbers() -> None:
    graph = weighted_graph([MIB] * 8, embedding=2 * MIB, head=MIB)

    def why(count: int, memory: int, stages: int) -> str | None:
        return why_too_big(PlanRequest(graph=graph, devices=cpu_devices(count=count, memory_bytes=memory)), stages)

    assert why(4, 20 * MIB, 1) is None
    assert why(4, 10 * MIB, 1) == "needs 11 MiB on 1 stage, the largest device offers 10 MiB"
    assert why(1, 10 * MIB, 1) == "needs 11 MiB on 1 stage, the device offers 10 MiB"
    assert why(4, 5 * MIB, 2) == "needs 11 MiB over 2 stages, the 2 largest devices offer 10 MiB"
    assert (
        why(4, 3 * MIB - 1, 4) == "the largest of 4 stages needs at least 3 MiB, the largest device offers 2.999999 MiB"
    )
    assert why(8, MIB, 8) == "needs 11 MiB over 8 stages, the 8 devices offer 8 MiB"


@pytest.mark.parametrize(
    ("decoders", "devices", "text"),
    [
        (8, 8, "the model has 8 decoder layers and 8 devices are here, so at most 8 stages"),
        (8, 1, "the model has 8 decoder layers and 1 device is here, so at most 1 stage"),
        (1, 2, "the model has 1 decoder layer and 2 devices are here, so at most 1 stage"),
    ],
)
def test_the_limit_of_stages_is_a_sentence(decoders: int, devices: int, text: str) -> None:
    assert stage_limit_sentence(num_decoders=decoders, num_devices=devices) == text
