"""A simulated replica: single requests to the digit, and many against a simulation of every step on its own."""

from dataclasses import replace

import pytest

from planner.prediction import NO_TARGETS, predict
from planner.request_figures import figures
from planner.simulation.clock import Clock
from planner.simulation.replica import Replica, SimulatedRequest
from planner.simulation.standing import Expectation, Standing
from planner.simulation.step_times import StepTimes
from planner.traces import TraceRequest, drawn_trace
from planner.workload import Workload
from tests.support.simulated import CALL_S, PROMPT_TOKEN_S, TOKEN_S, pipeline_of, request, served, times_of
from tests.unit.planner.test_prediction_simulated import simulated

LENGTHS = Workload(prompt_tokens_mean=200, output_tokens_mean=100)


def one(arrival_s: float = 0.0, prompt: int = 200, output: int = 100) -> TraceRequest:
    return TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)


def test_one_request_alone() -> None:
    [found] = served(pipeline_of(), [one(1.0)])

    first_s = CALL_S + 200 * PROMPT_TOKEN_S
    assert found.first_token_s - 1.0 == pytest.approx(first_s, rel=0.01)
    assert found.end_s - found.first_token_s == pytest.approx(99 * (CALL_S + TOKEN_S), rel=0.02)


def test_each_sequence_of_a_step_may_take_time_beside_the_stages() -> None:
    beside = replace(pipeline_of(), step_overhead_s=0.004, sequence_overhead_s=0.001)
    [bare], [told] = served(pipeline_of(), [one()]), served(beside, [one()])
    assert told.end_s - told.first_token_s == pytest.approx(bare.end_s - bare.first_token_s + 99 * 0.005, rel=0.001)

    pair, late = served(pipeline_of(), [one()] * 2), served(beside, [one()] * 2)
    assert late[0].end_s - pair[0].end_s == pytest.approx(100 * 0.006, rel=0.02)


def test_an_answer_of_one_token_ends_with_its_prompt() -> None:
    [found] = served(pipeline_of(), [one(output=1)])

    assert found.end_s == found.first_token_s


def test_a_long_prompt_is_computed_in_chunks() -> None:
    [found] = served(pipeline_of(max_step_tokens=50), [one(prompt=200, output=1)])

    assert found.first_token_s == pytest.approx(4 * (CALL_S + 50 * PROMPT_TOKEN_S), rel=0.01)


def test_a_request_alone_gains_nothing_from_more_stages() -> None:
    [single], [many] = served(pipeline_of(1), [one()]), served(pipeline_of(4), [one()])

    assert many.end_s - many.first_token_s == pytest.approx(single.end_s - single.first_token_s + 99 * 0.003, rel=0.01)


def test_many_requests_go_through_the_stages_side_by_side() -> None:
    trace = [one(prompt=10, output=200) for _ in range(8)]
    single, many = served(pipeline_of(1, slots=8), trace), served(pipeline_of(4, slots=8, hop_s=0.0), trace)

    assert max(each.end_s for each in many) < 0.8 * max(each.end_s for each in single)


def assert_alike(load: float, cv: float, *, count: int, ttft: float, tpot: float) -> None:
    """Compare means over so many requests with those of single steps; the random draws differ."""
    capacity = predict(pipeline_of(), LENGTHS).capacity_per_s
    workload = replace(LENGTHS, rate_per_s=load * capacity, cv=cv)
    ttft_s, tpot_s = simulated(rate_per_s=workload.rate_per_s, cv=cv, slots=64, count=count)

    found = figures(
        times_of(served(pipeline_of(), drawn_trace(workload, duration_s=count / workload.rate_per_s, seed=1))),
        NO_TARGETS,
    )

    assert found.ttft_s.mean == pytest.approx(ttft_s, rel=ttft)
    assert found.tpot_s.mean == pytest.approx(tpot_s, rel=tpot)


@pytest.mark.parametrize(("cv", "within"), [(0.5, 0.1), (1.0, 0.15), (3.0, 0.4)])
@pytest.mark.parametrize("load", [0.2, 0.5, 0.75])
def test_rounds_at_once_do_what_single_steps_do(load: float, cv: float, within: float) -> None:
    assert_alike(load, cv, count=3000, ttft=within, tpot=0.1)


@pytest.mark.long
@pytest.mark.parametrize(("cv", "ttft", "tpot"), [(0.5, 0.02, 0.02), (1.0, 0.02, 0.02), (3.0, 0.15, 0.07)])
@pytest.mark.parametrize("load", [0.2, 0.5, 0.75])
def test_rounds_at_once_do_what_single_steps_do_closely(load: float, cv: float, ttft: float, tpot: float) -> None:
    """With ten times the requests the draws matter less, but for bursts near the capacity."""
    assert_alike(load, cv, count=30_000, ttft=ttft, tpot=tpot)


def test_a_full_kv_cache_makes_requests_wait_and_the_youngest_give_way() -> None:
    trace = [one(prompt=100, output=300) for _ in range(8)]

    found = served(pipeline_of(slots=64, kv_tokens=1000), trace)

    assert len(found) == 8
    assert sum(each.preemptions for each in found) > 0
    assert {each.done_tokens for each in found} == {300}


def stand(stages: int = 1, *, kv_tokens: int = 0) -> tuple[Clock, Replica, list[SimulatedRequest]]:
    clock, ended = Clock(), list[SimulatedRequest]()
    replica = Replica(clock, StepTimes(pipeline_of(stages, kv_tokens=kv_tokens)), name="r", on_end=ended.append)
    return clock, replica, ended


def test_a_change_of_layout_pauses_and_loses_nothing() -> None:
    clock, replica, ended = stand()
    for number in range(4):
        replica.submit(request(number))
    clock.run(until_s=0.5)
    replica.change(StepTimes(pipeline_of(4)), pause_s=2.0)
    clock.run(until_s=2.4)
    assert not ended
    clock.run(until_s=100.0)

    assert len(ended) == 4
    assert replica.live == 0
    assert replica.kv_used_tokens == pytest.approx(0.0, abs=1e-6)


def test_a_smaller_kv_cache_sends_the_youngest_back() -> None:
    clock, replica, ended = stand()
    for number in range(4):
        replica.submit(request(number, prompt=200))
    clock.run(until_s=0.2)
    replica.change(StepTimes(pipeline_of(kv_tokens=450)), pause_s=0.0)
    clock.run(until_s=100.0)

    assert [each.number for each in ended][:1] == [0]
    assert sorted(each.number for each in ended) == [0, 1, 2, 3]
    assert ended[-1].preemptions > 0


def test_requests_that_are_taken_keep_their_tokens() -> None:
    clock, replica, ended = stand()
    replica.submit(request(0))
    clock.run(until_s=0.5)

    [taken] = replica.take_all()

    assert 0 < taken.done_tokens < 100
    assert replica.live == 0
    replica.submit(taken)
    clock.run(until_s=100.0)
    assert ended == [taken]
    assert taken.first_token_s < 0.5


def test_the_same_trace_gives_the_same_times() -> None:
    trace = drawn_trace(replace(LENGTHS, rate_per_s=20.0, cv=3.0), duration_s=60.0, seed=5)
    first, again = (served(pipeline_of(2), trace) for _ in range(2))

    assert [(each.number, each.end_s) for each in first] == [(each.number, each.end_s) for each in again]


def test_routing_is_told_of_all_who_are_there() -> None:
    clock, replica, _ = stand()
    for number in range(20):
        replica.submit(request(number, prompt=1000, output=50))
    load = Standing(replica, Expectation(10.0))
    assert (load.requests, load.prefill_tokens, load.kv_tokens) == (20, 20_000, 20 * 1010)
    assert load.steps_until_room(1010.0, capacity=21 * 1010.0) == 0.0
    assert load.steps_until_room(1010.0, capacity=10 * 1010.0) == pytest.approx(11.0)  # 1.1 times a full KV cache
    clock.run(until_s=0.1)
    assert 0 < load.prefill_tokens < 20_000
    assert load.kv_tokens == pytest.approx(20 * 1010, rel=0.05)  # and the tokens that have come


def seen_of(replica: Replica) -> tuple[float, ...]:
    load = Standing(replica, Expectation(10.0))
    return load.requests, load.prefill_tokens, load.kv_tokens


def test_prompts_that_are_ahead_are_counted_right_through_preemptions() -> None:
    """Whatever happened before, an idle replica is to routing as a fresh one."""
    clock, replica, ended = stand(kv_tokens=1000)
    for number in range(12):
        replica.submit(request(number, prompt=100 + 20 * number, output=200))
    clock.run(until_s=1.0)
    for each in replica.take_all():
        replica.submit(each)
    clock.run(until_s=1000.0)
    fresh = stand(kv_tokens=1000)[1]

    assert len(ended) == 12
    assert sum(each.preemptions for each in ended) > 0
    assert seen_of(replica) == seen_of(fresh)
