"""Plans: from a question to candidates, and which of them is chosen."""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest

from planner.candidate_plan import CandidatePlan, Found, PlanAnswer, Verdict
from planner.errors import InvalidLayout, NoFeasiblePlan, PlanTimeout
from planner.kv_capacity import KvPerDevice
from planner.layer_costs import Batch
from planner.layout import Pipeline, Stage, pipeline_of
from planner.model_graph import Layer
from planner.planning import plan, require_plan, stage_counts
from planner.problem import check_pipeline, pose
from planner.question import EngineLimits, Fragmentation, PlanQuestion
from planner.replanner import PlanSession
from planner.stage_times import micro_batches
from planner.workload import Slo, Workload
from tests.support.costs import FlatCosts
from tests.support.graphs import graph_of, weighted_graph
from topology.cluster import ClusterTopology, merge
from topology.device import Device, DeviceKind, cpu_devices
from topology.link import Link, LinkKind
from topology.resource_graph import ResourceGraph
from topology.topology import HostTopology, pair_key
from topology.units import GIB, MIB

GRAPH = weighted_graph([MIB] * 8, embedding=MIB, head=MIB)  # a byte of KV cache per token and decoder


def host(count: int = 8, *, memory_bytes: int = 64 * MIB) -> HostTopology:
    return HostTopology(host_id="h", devices=cpu_devices(count=count, memory_bytes=memory_bytes, host_id="h"))


def question(**values: object) -> PlanQuestion:
    asked = PlanQuestion(
        graph=GRAPH,
        costs=FlatCosts(),
        topology=host(),
        engine=EngineLimits(max_stages=8, max_sequences=16, max_step_tokens=256, kv_tokens=4096),
        workload=Workload(rate_per_s=1.0, prompt_tokens_mean=64, output_tokens_mean=32),
        slo=Slo(ttft_s=2.0),
    )
    return replace(asked, **values)  # type: ignore[arg-type]


def answer(**values: object) -> PlanAnswer:
    return plan(question(**values), clock=itertools.repeat(0.0).__next__)


def chosen(**values: object) -> Found:
    return require_plan(answer(**values))


def by_stages(found: PlanAnswer) -> dict[int, CandidatePlan]:
    return {each.num_stages: each for each in found.candidates}


def test_a_window_saves_kv_cache_only_where_the_engine_does_not_reserve_it_in_full() -> None:
    """The native engine says its capacity, and keeps every token of it in every layer."""
    decoders = tuple(replace(layer, window_tokens=10, kv_bytes_per_token=96) for layer in GRAPH.decoders)
    graph = replace(GRAPH, layers=(GRAPH.embedding, *decoders, GRAPH.head))
    for kv_tokens, per_token in ((4096, 8 * 96), (None, 8 * 10)):  # a sequence has 96 tokens at its end
        engine = EngineLimits(max_stages=8, max_sequences=16, max_step_tokens=256, kv_tokens=kv_tokens)
        pieces = pose(question(graph=graph, engine=engine), num_stages=1, degree=1).problem.pieces
        assert sum(piece.kv_bytes_per_token for piece in pieces) == per_token


def test_calm_traffic_takes_as_few_devices_as_serve_it() -> None:
    found = answer()
    assert found.chosen is not None
    assert found.chosen.num_stages == 1
    assert "serves 1 of 1 requests/s in time" in found.reason
    assert [each.num_stages for each in found.candidates] == [1, 2, 3, 4, 8]
    assert by_stages(found)[4].reason == "takes 3 more devices and serves no better"


def test_traffic_that_one_stage_cannot_serve_takes_more() -> None:
    found = answer(workload=Workload(rate_per_s=60.0, prompt_tokens_mean=64, output_tokens_mean=32))
    assert found.chosen is not None
    assert found.chosen.num_stages > 1
    assert "less goodput" in by_stages(found)[1].reason


def test_stages_that_share_cores_gain_less() -> None:
    busy = Workload(rate_per_s=60.0, prompt_tokens_mean=64, output_tokens_mean=32)
    free = by_stages(answer(workload=busy))[8].found
    shared = by_stages(answer(workload=busy, cores=2))[8].found
    assert free is not None
    assert shared is not None
    assert shared.prediction.capacity_per_s < free.prediction.capacity_per_s / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class OfThreads(FlatCosts):
    """The more threads, the faster."""

    def layer_s(self, layer: Layer, device: Device, batch: Batch) -> float:
        return FlatCosts.layer_s(self, layer, device, batch) / device.threads


def test_where_a_device_is_a_core_two_stages_serve_twice_as_much_as_one() -> None:
    """Where a single stage has all cores, as much."""
    costs = OfThreads(decoder_s=0.0, token_s=1e-4)

    def capacities(threads_per_device: int) -> list[float]:
        found = by_stages(answer(costs=costs, cores=2, threads_per_device=threads_per_device))
        plans = [each for each in (found[1].found, found[2].found) if each is not None]
        return [each.prediction.capacity_per_s for each in plans]

    one, two = capacities(threads_per_device=1)
    assert 1.8 < two / one < 2.05
    shared, likewise = capacities(threads_per_device=0)
    assert shared > 1.8 * one
    assert likewise < 1.1 * shared


def test_one_stage_has_one_micro_batch_whatever_the_engine_would_have_in_flight() -> None:
    """Two would make each step read the weights twice, which the engine does not do."""
    engine = EngineLimits(max_stages=8, max_sequences=16, max_step_tokens=256, kv_tokens=4096, micro_batches=2)
    asked = question(engine=engine, cores=2)
    assert [micro_batches(asked, num_stages=count) for count in (1, 2, 8)] == [1, 2, 2]
    assert micro_batches(question(), num_stages=8) == 8


def test_a_number_of_stages_is_done_as_asked() -> None:
    found = answer(num_stages=4)
    assert [each.num_stages for each in found.candidates] == [4]
    assert found.reason == "as many stages as were asked for"
    pipeline = require_plan(found).pipelines[0]
    assert [stage.num_decoders for stage in pipeline.stages] == [2, 2, 2, 2]


def test_slow_devices_get_fewer_layers() -> None:
    devices = [replace(device, name=name) for device, name in zip(host(2).devices, ("fast", "slow"), strict=True)]
    found = chosen(
        topology=HostTopology(host_id="h", devices=tuple(devices)),
        costs=FlatCosts(slowness={"slow": 3.0}),
        num_stages=2,
        engine=EngineLimits(max_stages=2, kv_tokens=4096),
    )
    counts = {stage.device_ids[0]: stage.num_decoders for stage in found.pipelines[0].stages}
    assert counts == {"cpu:0": 6, "cpu:1": 2}


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


def test_more_stages_than_there_can_be_is_an_error() -> None:
    with pytest.raises(NoFeasiblePlan, match="at most 8 stages"):
        answer(num_stages=9)
    with pytest.raises(NoFeasiblePlan, match="2 devices are here, so at most 2 stages"):
        answer(num_stages=3, topology=host(2))


def test_a_deadline_that_has_passed_still_has_the_first_guess_and_proves_nothing() -> None:
    found = require_plan(plan(question(num_stages=3), clock=itertools.count(0.0, 100.0).__next__))
    assert found.pipelines[0].granularity == 3
    assert not found.optimal


def test_a_guess_that_is_too_slow_for_the_targets_is_better_than_none() -> None:
    """The roomiest devices, which a guess takes, are the slow ones; there is no time to find out about the others."""
    devices = tuple(
        Device(id=f"cpu:{n}", kind=DeviceKind.CPU, memory_total_bytes=size, host_id="h", name=name)
        for n, (size, name) in enumerate(
            [(64 * MIB, "slow"), (64 * MIB, "slow"), (32 * MIB, "fast"), (32 * MIB, "fast")]
        )
    )
    asked = question(
        num_stages=2,
        slo=Slo(tpot_s=0.05),
        topology=HostTopology(host_id="h", devices=devices),
        costs=FlatCosts(slowness={"slow": 10.0}),
    )
    assert set(require_plan(plan(asked, clock=time.monotonic)).pipelines[0].device_ids) == {"cpu:2", "cpu:3"}
    hurried = require_plan(plan(asked, clock=itertools.count(0.0, 100.0).__next__))
    assert set(hurried.pipelines[0].device_ids) == {"cpu:0", "cpu:1"}
    assert not hurried.optimal


def test_a_deadline_that_has_passed_is_not_infeasible() -> None:
    """Only the second device takes the large decoder, which comes first: a guess in the order of the devices fails."""
    small, large = (
        Device(id=f"cpu:{n}", kind=DeviceKind.CPU, memory_total_bytes=size, host_id="h")
        for n, size in enumerate((3 * MIB, 8 * MIB))
    )
    asked = question(
        graph=weighted_graph([6 * MIB, MIB]),
        topology=HostTopology(host_id="h", devices=(small, large)),
        engine=EngineLimits(max_stages=2, kv_tokens=0),
        num_stages=2,
    )
    assert require_plan(plan(asked, clock=time.monotonic)).pipelines[0].device_ids == ("cpu:1", "cpu:0")
    with pytest.raises(PlanTimeout, match="nothing found"):
        require_plan(plan(asked, clock=itertools.count(0.0, 100.0).__next__))


def test_a_plan_begins_with_what_an_earlier_one_found() -> None:
    """A guess in the order of the devices fails, and there is no time for more than a guess."""
    small, large = (
        Device(id=f"cpu:{n}", kind=DeviceKind.CPU, memory_total_bytes=size, host_id="h")
        for n, size in enumerate((3 * MIB, 8 * MIB))
    )
    asked = question(
        graph=weighted_graph([6 * MIB, MIB]),
        topology=HostTopology(host_id="h", devices=(small, large)),
        engine=EngineLimits(max_stages=2, kv_tokens=0),
        num_stages=2,
    )
    session, late = PlanSession(), itertools.count(0.0, 100.0).__next__
    first = require_plan(plan(asked, clock=time.monotonic, session=session))
    assert require_plan(plan(asked, clock=late, session=session)).pipelines == first.pipelines
    with pytest.raises(PlanTimeout):
        require_plan(plan(asked, clock=late))


@pytest.mark.parametrize("session", [None, PlanSession()])
def test_a_device_of_the_layout_in_force_that_is_gone_takes_only_its_own_layers_along(
    session: PlanSession | None,
) -> None:
    current = pipeline_of(device_ids=["cpu:0", "cpu:3"], cuts=[4], num_decoders=8)
    plan(question(num_stages=2), clock=time.monotonic, session=session)
    asked = question(num_stages=2, topology=host(3), current=current)
    found = require_plan(plan(asked, clock=time.monotonic, session=session))
    first, second = found.pipelines[0].stages
    assert first == current.stages[0]
    assert second.device_ids[0] in {"cpu:1", "cpu:2"}
    late = require_plan(plan(asked, clock=itertools.count(0.0, 100.0).__next__))
    assert late.pipelines[0].stages[0] == current.stages[0]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_resident_ranks_have_an_answer_though_no_time_is_left(stages: int) -> None:
    ranks = (("cpu:4",), ("cpu:1",), ("cpu:6",), ("cpu:0",))
    engine = EngineLimits(max_stages=4, kv_tokens=4096, resident=ranks)
    late = plan(question(engine=engine, num_stages=stages), clock=itertools.count(0.0, 100.0).__next__)
    assert require_plan(late).pipelines[0].granularity == stages


def test_the_layout_in_force_stays_where_nothing_is_better() -> None:
    now = pipeline_of(device_ids=["cpu:3", "cpu:5"], cuts=[4], num_decoders=8)
    found = answer(current=now)
    assert require_plan(found).pipelines == (now,)
    assert require_plan(found).costs.moved_bytes == 0


def test_of_equal_devices_the_first_are_taken_in_order() -> None:
    assert chosen(num_stages=4).pipelines[0].device_ids == ("cpu:0", "cpu:1", "cpu:2", "cpu:3")
    now = pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[4], num_decoders=8)
    four = chosen(current=now, num_stages=4).pipelines[0]
    assert set(four.device_ids) == {"cpu:0", "cpu:1", "cpu:2", "cpu:3"}


def test_a_change_moves_little() -> None:
    now = pipeline_of(device_ids=["cpu:3", "cpu:5"], cuts=[4], num_decoders=8)
    four = chosen(current=now, num_stages=4).pipelines[0]
    assert {"cpu:3", "cpu:5"} <= set(four.device_ids)
    one = chosen(current=now, num_stages=1).pipelines[0]
    assert set(one.device_ids) <= {"cpu:3", "cpu:5"}


def test_the_layout_in_force_must_be_one_of_the_model() -> None:
    with pytest.raises(InvalidLayout):
        answer(current=pipeline_of(device_ids=["cpu:0"], cuts=[], num_decoders=5))


def test_resident_ranks_keep_their_order_and_both_ends() -> None:
    ranks = (("cpu:4",), ("cpu:1",), ("cpu:6",), ("cpu:0",))
    engine = EngineLimits(max_stages=4, kv_tokens=4096, resident=ranks)
    assert stage_counts(question(engine=engine)) == (2, 3, 4)
    three = chosen(engine=engine, num_stages=3).pipelines[0]
    assert three.device_ids[0] == "cpu:4"
    assert three.device_ids[-1] == "cpu:0"


def gpus(count: int, *, islands: int, memory_bytes: int = 8 * GIB, others: tuple[int, ...] = ()) -> HostTopology:
    """Return GPUs of which ``count / islands`` each are joined by NVLink; those of ``others`` have other tenants."""
    devices = tuple(
        Device(
            id=f"GPU-{index}",
            kind=DeviceKind.CUDA,
            memory_total_bytes=memory_bytes,
            memory_reserved_bytes=GIB if index in others else 0,
            memory_others_bytes=GIB if index in others else 0,
            host_id="h",
        )
        for index in range(count)
    )
    size = count // islands
    links = {
        pair_key(a.id, b.id): Link(kind=LinkKind.NVSWITCH, bandwidth_bytes_per_s=3e11, latency_s=2e-6)
        for (i, a), (j, b) in itertools.combinations(enumerate(devices), 2)
        if i // size == j // size
    }
    return HostTopology(host_id="h", devices=devices, links=links)


def test_tensor_parallel_groups_stay_within_an_island() -> None:
    engine = EngineLimits(max_stages=8, degrees=(2, 4, 8), kv_tokens=4096)
    found = answer(topology=gpus(8, islands=2), engine=engine, graph=graph_of())
    assert {each.degree for each in found.candidates} == {2, 4}
    for each in found.candidates:
        for pipeline in each.found.pipelines if each.found else ():
            for stage in pipeline.stages:
                assert len({int(device.removeprefix("GPU-")) // 4 for device in stage.device_ids}) == 1


def test_leftovers_are_used_before_whole_gpus_but_not_in_bursts() -> None:
    small = EngineLimits(max_stages=1, kv_tokens=4096)
    machine = gpus(4, islands=1, others=(2,))
    calm = chosen(topology=machine, engine=small)
    assert calm.pipelines[0].device_ids == ("GPU-2",)
    bursty = chosen(topology=machine, engine=small, workload=replace(question().workload, cv=4.0))
    assert bursty.pipelines[0].device_ids != ("GPU-2",)
    careless = chosen(topology=machine, engine=small, fragmentation=Fragmentation(whole_device=0, whole_island=0))
    assert careless.pipelines[0].device_ids != ("GPU-2",)


def marked_cluster(*scaled: str) -> tuple[ClusterTopology, Mapping[str, float]]:
    hosts = [
        HostTopology(host_id=name, rack=rack, devices=cpu_devices(count=2, memory_bytes=64 * MIB))
        for name, rack in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    cluster = merge(hosts)
    return cluster, ResourceGraph(cluster=cluster).scaled(scaled, now_s=0.0).heats(now_s=10.0)


@pytest.mark.parametrize(
    ("scaled", "expected"), [((), "a"), (("a/cpu:0",), "c"), (("a/cpu:0", "c/cpu:0", "c/cpu:1"), "b")]
)
def test_new_instances_avoid_paths_with_marks_of_recent_scaling(scaled: tuple[str, ...], expected: str) -> None:
    cluster, marks = marked_cluster(*scaled)
    found = chosen(topology=cluster, scaling=marks, num_stages=2)
    assert {device.partition("/")[0] for device in found.pipelines[0].device_ids} == {expected}


def test_marks_do_not_drive_a_layout_away_from_where_it_is() -> None:
    cluster, marks = marked_cluster("a/cpu:0", "a/cpu:1")
    current = pipeline_of(device_ids=["a/cpu:0", "a/cpu:1"], cuts=[4], num_decoders=8)
    assert chosen(topology=cluster, scaling=marks, num_stages=2, current=current).pipelines == (current,)


def test_a_limit_of_the_engine_is_a_candidate_with_its_reason() -> None:
    one = EngineLimits(max_stages=1, kv_tokens=4096, stages_reason="one rank only")
    found = answer(engine=one)
    assert {count: each.verdict for count, each in by_stages(found).items()} == {
        1: Verdict.CHOSEN,
        2: Verdict.INFEASIBLE,
    }
    assert by_stages(found)[2].reason == "one rank only"
    assert chosen(engine=one, num_stages=1).pipelines[0].granularity == 1
    with pytest.raises(NoFeasiblePlan, match="one rank only"):
        answer(engine=one, num_stages=2)
    two = chosen(num_stages=2).pipelines[0]
    assert check_pipeline(question(engine=one), two) == ("one rank only",)
    assert check_pipeline(question(), two) == ()


def test_more_replicas_are_added_while_traffic_asks_for_them() -> None:
    busy = Workload(rate_per_s=150.0, prompt_tokens_mean=64, output_tokens_mean=32)
    engine = EngineLimits(max_stages=1, max_sequences=16, kv_tokens=4096)
    alone = chosen(workload=busy, engine=engine)
    several = chosen(workload=busy, engine=engine, max_replicas=8)
    assert len(alone.pipelines) == 1
    assert len(several.pipelines) > 1
    used = [device for pipeline in several.pipelines for device in pipeline.device_ids]
    assert len(used) == len(set(used))
    assert several.prediction.goodput_per_s > alone.prediction.goodput_per_s


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


def test_each_candidate_has_the_cv_at_which_it_does_best() -> None:
    found = answer(workload=Workload(rate_per_s=20.0, prompt_tokens_mean=64, output_tokens_mean=32))
    assert all(each.found is None or each.found.best_cv is not None for each in found.candidates)


def test_headroom_is_left_free() -> None:
    tight = host(memory_bytes=11 * MIB)
    assert by_stages(answer(topology=tight))[1].verdict is not Verdict.INFEASIBLE
    assert by_stages(answer(topology=tight, headroom=0.2))[1].verdict is Verdict.INFEASIBLE


def test_any_pipeline_can_be_held_against_the_rules() -> None:
    fine = pipeline_of(device_ids=["cpu:7", "cpu:2"], cuts=[3], num_decoders=8)
    assert check_pipeline(question(), fine) == ()
    [sentence] = check_pipeline(question(topology=host(memory_bytes=6 * MIB)), fine)
    assert sentence.startswith("stage 1 needs 6.")
    elsewhere = pipeline_of(device_ids=["cpu:99"], cuts=[], num_decoders=8)
    assert "cpu:99, which is no place" in check_pipeline(question(), elsewhere)[0]
    pairs = Stage(device_ids=("cpu:0", "cpu:1"), first_decoder=0, end_decoder=4)
    alone = Stage(device_ids=("cpu:2",), first_decoder=4, end_decoder=8)
    assert "1 and 2 devices" in check_pipeline(question(), Pipeline(stages=(pairs, alone)))[0]
    headless = Pipeline(
        stages=(replace(alone, first_decoder=0), replace(alone, device_ids=("cpu:0",), first_decoder=8))
    )
    assert check_pipeline(question(), headless) == ()
