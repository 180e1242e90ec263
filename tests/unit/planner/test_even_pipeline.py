"""The solver against brute force over all cuts and all choices of devices, and the sentences of its plans."""

import random
from dataclasses import replace
from itertools import combinations, permutations

import pytest

from planner.candidates import candidates, kept_bytes, layer_bytes
from planner.errors import InvalidLayout, NoFeasiblePlan, PlanTimeout
from planner.even_pipeline import plan
from planner.layout import Pipeline, Stage, pipeline_of
from planner.partition import stage_costs, unevenness
from planner.plan import PlanRequest
from tests.support.graphs import SMALL_GPT2, graph_of, weighted_graph
from topology.device import Device, DeviceKind, cpu_devices
from topology.units import GIB, MIB

EIGHT = weighted_graph([MIB] * 8, embedding=MIB // 2, head=MIB // 2)
DEVICES = cpu_devices(count=8, memory_bytes=96 * MIB)


def ends(pipeline: Pipeline) -> list[tuple[str, int]]:
    return [(stage.device_ids[0], stage.num_decoders) for stage in pipeline.stages]


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_equal_decoders_are_spread_equally_over_the_first_devices(stages: int) -> None:
    found = plan(PlanRequest(graph=EIGHT, devices=DEVICES, num_stages=stages))
    assert ends(found.pipeline) == [(f"cpu:{index}", 8 // stages) for index in range(stages)]
    assert found.optimal
    assert sum(found.stage_bytes) == 9 * MIB
    assert found.reasons[0] == ("1 stage, as asked" if stages == 1 else f"{stages} stages, as asked")


def test_stage_bytes_and_reasons_are_those_of_the_plan() -> None:
    request = PlanRequest(
        graph=EIGHT,
        devices=DEVICES,
        num_stages=3,
        kv_bytes_per_decoder=MIB,
        workspace_bytes=MIB,
        current=pipeline_of(device_ids=["cpu:5"], cuts=[], num_decoders=8),
    )
    found = plan(request)
    assert sorted(found.stage_bytes) == [5 * MIB + MIB // 2, 7 * MIB, 7 * MIB + MIB // 2]
    assert found.reasons == (
        "3 stages, as asked",
        f"at most 7.5 MiB on a device ({found.pipeline.device_ids[found.stage_bytes.index(max(found.stage_bytes))]}), "
        "at least 5.5 MiB",
        "6.5 MiB of 17 MiB of weights and KV cache stay where they are",
    )


def test_a_merge_and_a_split_keep_cuts_and_layers() -> None:
    current = plan(PlanRequest(graph=EIGHT, devices=DEVICES, num_stages=4)).pipeline
    merged = plan(PlanRequest(graph=EIGHT, devices=DEVICES, num_stages=2, current=current)).pipeline
    assert [stage.first_decoder for stage in merged.stages] == [0, 4]
    assert set(merged.device_ids) <= set(current.device_ids)
    split = plan(PlanRequest(graph=EIGHT, devices=DEVICES, num_stages=4, current=merged))
    kept, whole = kept_bytes(PlanRequest(graph=EIGHT, devices=DEVICES, current=merged), split.pipeline)
    assert (kept, whole) == (5 * MIB, 9 * MIB)
    same = plan(PlanRequest(graph=EIGHT, devices=DEVICES, num_stages=4, current=current)).pipeline
    assert same == current


def test_auto_takes_the_fewest_stages_that_fit_and_says_why_not_fewer() -> None:
    roomy = plan(PlanRequest(graph=EIGHT, devices=DEVICES))
    assert roomy.pipeline.granularity == 1
    assert roomy.reasons == ("1 stage, which is enough", "9 MiB on cpu:0")
    tight = plan(PlanRequest(graph=EIGHT, devices=cpu_devices(count=8, memory_bytes=4 * MIB)))
    assert tight.pipeline.granularity == 3
    assert tight.reasons[0] == (
        "3 stages, the fewest that fit (2 stages: needs 9 MiB over 2 stages, the 2 largest devices offer 8 MiB)"
    )


def test_what_cannot_be_has_the_numbers() -> None:
    with pytest.raises(NoFeasiblePlan, match="8 decoder layers and 8 devices are here, so at most 8 stages"):
        plan(PlanRequest(graph=EIGHT, devices=DEVICES, num_stages=9))
    with pytest.raises(NoFeasiblePlan, match="needs 9 MiB over 8 stages, the 8 devices offer 8 MiB"):
        plan(PlanRequest(graph=EIGHT, devices=cpu_devices(count=8, memory_bytes=MIB)))
    uneven = tuple(
        Device(id=f"cpu:{index}", kind=DeviceKind.CPU, memory_total_bytes=size * MIB)
        for index, size in enumerate([9, 1])
    )
    with pytest.raises(
        NoFeasiblePlan, match=r"no way to place 2 stages of 9 MiB together fits: 2 devices offer 10 MiB"
    ):
        plan(PlanRequest(graph=EIGHT, devices=uneven, num_stages=2))


def test_the_memory_of_the_layout_in_force_counts() -> None:
    """cpu:0 is full as long as the current layout stands, so the whole model cannot come to it."""
    current = pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[4], num_decoders=8)
    devices = cpu_devices(count=2, memory_bytes=9 * MIB)
    request = PlanRequest(graph=EIGHT, devices=devices, num_stages=2, current=current)
    assert plan(request).pipeline == current
    assert plan(replace(request, num_stages=1)).pipeline.device_ids == ("cpu:0",)
    tight = replace(request, devices=cpu_devices(count=2, memory_bytes=9 * MIB - 1), num_stages=1)
    with pytest.raises(NoFeasiblePlan):
        plan(tight)
    crossed = pipeline_of(device_ids=["cpu:1", "cpu:0"], cuts=[4], num_decoders=8)
    small = replace(request, devices=cpu_devices(count=2, memory_bytes=5 * MIB), current=crossed)
    assert plan(small).pipeline == crossed


def test_tensor_parallel_stages_hold_memory_but_nothing_of_them_is_kept() -> None:
    pair = Pipeline(stages=(Stage(device_ids=("cpu:0", "cpu:1"), first_decoder=0, end_decoder=8),))
    request = PlanRequest(graph=EIGHT, devices=DEVICES, num_stages=1, current=pair, kv_bytes_per_decoder=3)
    held = candidates(request, 1)
    assert [candidate.held_bytes for candidate in held[:2]] == [9 * MIB // 2 + 8 * 2] * 2
    assert kept_bytes(request, plan(request).pipeline)[0] == 0


def test_cuts_lie_where_they_are_legal() -> None:
    graph = replace(weighted_graph([5, 1, 1, 1, 1, 1], embedding=1, head=1), legal_cuts=(3, 5))
    found = plan(PlanRequest(graph=graph, devices=DEVICES, num_stages=2))
    assert ends(found.pipeline) == [("cpu:0", 3), ("cpu:1", 3)]
    assert found.stage_bytes == (8, 4)
    with pytest.raises(NoFeasiblePlan, match="at most 3 stages"):
        plan(PlanRequest(graph=graph, devices=DEVICES, num_stages=4))


def test_a_current_layout_of_another_model_is_refused() -> None:
    other = pipeline_of(device_ids=["cpu:0"], cuts=[], num_decoders=6)
    with pytest.raises(InvalidLayout, match="8 decoder layers, but the layout places 6"):
        plan(PlanRequest(graph=EIGHT, devices=DEVICES, current=other))


def test_no_time_is_not_no_plan() -> None:
    with pytest.raises(PlanTimeout, match="nothing found in 1e-09 s for 2 stages"):
        plan(PlanRequest(graph=EIGHT, devices=DEVICES, num_stages=2, deadline_s=1e-9))


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_resident_ranks_keep_their_order_and_both_ends(stages: int) -> None:
    devices = tuple(reversed(cpu_devices(count=4, memory_bytes=GIB)))
    current = plan(PlanRequest(graph=EIGHT, devices=devices, num_stages=4, fixed_order=True)).pipeline
    request = PlanRequest(graph=EIGHT, devices=devices, num_stages=stages, fixed_order=True, current=current)
    places = [devices.index(next(d for d in devices if d.id == name)) for name in plan(request).pipeline.device_ids]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, 3)


def test_one_stage_cannot_lie_on_both_ends() -> None:
    devices = cpu_devices(count=2, memory_bytes=GIB)
    with pytest.raises(NoFeasiblePlan):
        plan(PlanRequest(graph=EIGHT, devices=devices, num_stages=1, fixed_order=True))


def test_the_same_question_has_the_same_answer() -> None:
    request = PlanRequest(
        graph=weighted_graph([3, 1, 4, 1, 5, 9, 2, 6], embedding=5, head=3), devices=DEVICES, num_stages=5
    )
    assert len({plan(request) for _ in range(3)}) == 1


def test_a_large_model_is_cut_evenly() -> None:
    """80 equal decoders whose ends weigh one decoder each: no stage needs more than 6."""
    graph = weighted_graph([GIB] * 80, embedding=GIB, head=GIB)
    found = plan(PlanRequest(graph=graph, devices=cpu_devices(count=16, memory_bytes=80 * GIB), num_stages=16))
    assert max(found.stage_bytes) == 6 * GIB
    assert found.optimal


@pytest.mark.parametrize("bad", [{"num_stages": 0}, {"deadline_s": 0.0}, {"kv_bytes_per_decoder": -1}])
def test_impossible_questions_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"at least one stage|negative"):
        replace(PlanRequest(graph=EIGHT, devices=DEVICES), **bad)  # type: ignore[arg-type]


# ---- brute force


def requests(seed: int) -> PlanRequest:
    """Return a small question: uneven layers, uneven devices, often tight, often with a layout in force."""
    rng = random.Random(seed)
    count, num_devices = rng.randint(2, 5), rng.randint(2, 4)
    shared = rng.choice([0, 0, 4])
    graph = weighted_graph(
        [rng.randint(2, 9) for _ in range(count)],
        embedding=shared + rng.randint(0, 6),
        head=shared + rng.randint(0, 6),
        shared=shared,
    )
    room = rng.choice([60, 25, 14])
    devices = tuple(
        Device(id=f"cpu:{index}", kind=DeviceKind.CPU, memory_total_bytes=room + rng.choice([0, 0, 7, 13]))
        for index in range(num_devices)
    )
    current = None
    if rng.random() < 0.7:
        stages = rng.randint(1, min(count, num_devices))
        cuts = sorted(rng.sample(range(1, count), stages - 1))
        names = rng.sample([device.id for device in devices], stages)
        current = pipeline_of(device_ids=names, cuts=cuts, num_decoders=count)
    return PlanRequest(
        graph=graph,
        devices=devices,
        num_stages=rng.randint(1, min(count, num_devices)),
        kv_bytes_per_decoder=rng.choice([0, 2]),
        workspace_bytes=rng.choice([0, 1]),
        current=current,
    )


def rank(request: PlanRequest, pipeline: Pipeline) -> tuple[int, ...] | None:
    """Return what the aims make of a pipeline, smaller is better; None where it does not fit. No solver is asked."""
    current, sizes = request.current, []
    memory = {device.id: device.memory_usable_bytes for device in request.devices}
    kept = 0
    for index, stage in enumerate(pipeline.stages):
        device = stage.device_ids[0]
        layers = list(request.graph.stage_layers(pipeline, index))
        there = []
        if current is not None and device in current.device_ids:
            there = list(request.graph.stage_layers(current, current.device_ids.index(device)))
        stay = layer_bytes([layer for layer in layers if layer in there], request)
        size = layer_bytes(layers, request) + request.workspace_bytes
        if layer_bytes(there, request) + size - stay > memory[device]:
            return None
        kept += stay
        sizes.append(size)
    firsts = {stage.first_decoder for stage in current.stages[1:]} if current else set()
    common = len(firsts & {stage.first_decoder for stage in pipeline.stages[1:]})
    return max(sizes), unevenness(sizes), -kept, -common


def brute_force(request: PlanRequest) -> tuple[int, ...] | None:
    assert request.num_stages is not None
    count = request.graph.num_decoders
    ranks = [
        rank(request, pipeline_of(device_ids=names, cuts=cuts, num_decoders=count))
        for cuts in combinations(range(1, count), request.num_stages - 1)
        for names in permutations([device.id for device in request.devices], request.num_stages)
    ]
    return min((found for found in ranks if found is not None), default=None)


@pytest.mark.parametrize("seed", range(120))
def test_plans_equal_brute_force(seed: int) -> None:
    request = requests(seed)
    best = brute_force(request)
    if best is None:
        with pytest.raises(NoFeasiblePlan, match=r"\d"):
            plan(request)
        return
    found = plan(request)
    assert rank(request, found.pipeline) == best
    assert found.optimal
    cuts = [stage.first_decoder for stage in found.pipeline.stages[1:]]
    assert found.stage_bytes == stage_costs(request, len(found.stage_bytes)).bytes_of_cuts(cuts)


def test_brute_force_has_seen_both_answers() -> None:
    answers = [brute_force(requests(seed)) is None for seed in range(120)]
    assert 10 < sum(answers) < 110


def test_a_tied_model_fits_one_device_by_counting_its_table_once() -> None:
    graph = graph_of(SMALL_GPT2)
    device = Device(id="cpu:0", kind=DeviceKind.CPU, memory_total_bytes=graph.total_weight_bytes)
    assert plan(PlanRequest(graph=graph, devices=(device,))).stage_bytes == (graph.total_weight_bytes,)
