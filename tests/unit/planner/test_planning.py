"""Plans: from a question to candidates of so many stages, and which of them is chosen in the time there is."""

import itertools
import time
from dataclasses import dataclass

import pytest

from planner.candidate_plan import Verdict
from planner.errors import NoFeasiblePlan, PlanTimeout
from planner.layer_costs import Batch
from planner.model_graph import Layer
from planner.planning import plan, require_plan
from planner.problem import check_pipeline
from planner.question import EngineLimits
from planner.replanner import PlanSession
from planner.stage_times import micro_batches
from planner.workload import Slo, Workload
from tests.support.costs import FlatCosts
from tests.support.graphs import weighted_graph
from tests.unit.planner.planning_questions import answer, by_stages, chosen, host, question
from topology.device import Device, DeviceKind
from topology.topology import HostTopology
from topology.units import MIB


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


def test_each_candidate_has_the_cv_at_which_it_does_best() -> None:
    found = answer(workload=Workload(rate_per_s=20.0, prompt_tokens_mean=64, output_tokens_mean=32))
    assert all(each.found is None or each.found.best_cv is not None for each in found.candidates)
