"""Plans: what fits, with the KV cache that each engine has."""

from dataclasses import replace

import pytest

from planner.candidate_plan import Verdict
from planner.errors import NoFeasiblePlan
from planner.kv_capacity import KvPerDevice
from planner.layout import pipeline_of
from planner.planning import require_plan
from planner.problem import pose
from planner.question import EngineLimits
from tests.unit.planner.planning_questions import GRAPH, answer, by_stages, chosen, host, question
from topology.units import MIB


def test_a_window_saves_kv_cache_only_where_the_engine_does_not_reserve_it_in_full() -> None:
    """The native engine says its capacity, and keeps every token of it in every layer."""
    decoders = tuple(replace(layer, window_tokens=10, kv_bytes_per_token=96) for layer in GRAPH.decoders)
    graph = replace(GRAPH, layers=(GRAPH.embedding, *decoders, GRAPH.head))
    for kv_tokens, per_token in ((4096, 8 * 96), (None, 8 * 10)):  # a sequence has 96 tokens at its end
        engine = EngineLimits(max_stages=8, max_sequences=16, max_step_tokens=256, kv_tokens=kv_tokens)
        pieces = pose(question(graph=graph, engine=engine), num_stages=1, degree=1).problem.pieces
        assert sum(piece.kv_bytes_per_token for piece in pieces) == per_token


def test_memory_decides_what_can_be() -> None:
    found = answer(topology=host(memory_bytes=7 * MIB))
    assert by_stages(found)[1].verdict is Verdict.INFEASIBLE
    assert "needs 10 MiB" in by_stages(found)[1].reason
    assert found.chosen is not None
    assert found.chosen.num_stages == 2


def test_where_nothing_fits_the_reason_has_the_numbers() -> None:
    found = answer(topology=host(memory_bytes=MIB))
    assert found.chosen is None
    with pytest.raises(NoFeasiblePlan, match=r"needs .* MiB .* offers .*"):
        require_plan(found)


def test_a_kv_cache_that_is_not_fixed_takes_what_is_left() -> None:
    fixed, free = EngineLimits(max_stages=8, kv_tokens=4096), EngineLimits(max_stages=8)
    assert chosen(engine=fixed, num_stages=2).kv_tokens == 4096
    found = chosen(engine=free, num_stages=2)
    assert found.kv_tokens > 4096
    assert found.nested
    assert found.times is not None
    assert found.times.kv_capacity_tokens == found.kv_tokens  # of the stages as they are, not of their first pieces
    assert max(memory.needed_bytes for memory in found.memory) <= 64 * MIB


def test_where_devices_have_kv_budgets_more_stages_have_more_kv_cache() -> None:
    budget = KvPerDevice(device_bytes=8 * 1024, block_tokens=16)  # 1,024 tokens of all eight decoders
    engine = EngineLimits(max_stages=8, max_sequences=16, kv_per_device=budget)
    found = by_stages(answer(engine=engine))
    tokens = {stages: each.found.kv_tokens for stages, each in found.items() if each.found}
    assert tokens == {1: 1024, 2: 2048, 3: 8192 // 3 // 16 * 16, 4: 4096, 8: 8192}
    for each in found.values():
        assert each.found is not None
        assert each.found.kv_tokens == budget.tokens(GRAPH, each.found.pipelines[0])
        assert all(memory.kv_bytes <= budget.device_bytes == memory.kv_budget_bytes for memory in each.found.memory)
        assert each.found.times is not None
        assert each.found.times.kv_capacity_tokens == each.found.kv_tokens


def test_a_kv_budget_is_reserved_on_each_device_once_for_what_stays_there() -> None:
    budget = KvPerDevice(device_bytes=16 * MIB, block_tokens=16)
    engine = EngineLimits(max_stages=8, max_sequences=16, max_step_tokens=256, kv_per_device=budget)
    half = pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[4], num_decoders=8)
    tight = host(2, memory_bytes=22 * MIB)  # 5 MiB of weights and the budget
    assert chosen(engine=engine, topology=tight, num_stages=2, current=half).pipelines == (half,)
    with pytest.raises(NoFeasiblePlan):
        chosen(engine=engine, topology=tight, num_stages=2, current=half, shares_current=False)
    with pytest.raises(NoFeasiblePlan):
        chosen(engine=engine, topology=host(2, memory_bytes=20 * MIB), num_stages=2)


def test_a_kv_budget_too_small_for_one_sequence_is_refused_with_the_numbers() -> None:
    engine = EngineLimits(max_stages=8, kv_per_device=KvPerDevice(device_bytes=96 * 4, block_tokens=16))
    with pytest.raises(NoFeasiblePlan, match="KV cache for 96 tokens takes 768 B of some stage, its budget is 384 B"):
        chosen(engine=engine, num_stages=1)
    assert chosen(engine=engine, num_stages=2).kv_tokens == 96


def test_headroom_is_left_free() -> None:
    tight = host(memory_bytes=11 * MIB)
    assert by_stages(answer(topology=tight))[1].verdict is not Verdict.INFEASIBLE
    assert by_stages(answer(topology=tight, headroom=0.2))[1].verdict is Verdict.INFEASIBLE
