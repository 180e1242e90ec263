"""Predictions against hand calculation, and against what must hold for any pipeline."""

from collections.abc import Callable
from dataclasses import replace
from math import inf, isinf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.layer_costs import Batch
from planner.prediction import PipelineTimes, best_cvs, predict
from planner.workload import Slo, Workload


def stage(call_s: float, token_s: float) -> Callable[[Batch], float]:
    return lambda batch: call_s + token_s * batch.tokens


def times(
    stages: int, *, call_s: float = 0.08, token_s: float = 0.0, hop_s: float = 0.002, kv_tokens: int = 10_000
) -> PipelineTimes:
    """Return ``stages`` equal stages that share ``call_s`` and ``token_s``."""
    return PipelineTimes(
        stages=tuple(stage(call_s / stages, token_s / stages) for _ in range(stages)),
        hops=tuple(lambda _tokens: hop_s for _ in range(stages - 1)),
        kv_capacity_tokens=kv_tokens,
        max_sequences=64,
        max_step_tokens=512,
    )


CALM = Workload(rate_per_s=0.001, prompt_tokens_mean=100, output_tokens_mean=100)


def test_one_request_in_an_idle_pipeline_takes_what_its_steps_take() -> None:
    """T_pipe = S * tau + (S - 1) * delta, once for the prompt and once for each further token."""
    alone = predict(times(4), CALM)
    assert alone.tpot_s == pytest.approx(0.08 + 3 * 0.002, rel=1e-3)
    assert alone.ttft_s == pytest.approx(0.08 + 3 * 0.002, rel=0.05)
    assert alone.throughput_tokens_per_s == pytest.approx(0.1)
    assert not alone.is_saturated


def test_what_a_step_takes_beside_its_stages_is_a_part_of_it() -> None:
    bare = predict(times(1), CALM)
    told = predict(replace(times(1), step_overhead_s=0.004, sequence_overhead_s=0.001), CALM)
    assert told.tpot_s == pytest.approx(bare.tpot_s + 0.005, rel=1e-3)
    # 64 sequences: 0.08 s of the stage, 0.068 s beside it, and each prompt adds what it adds without
    assert 1 / told.capacity_per_s == pytest.approx(1 / bare.capacity_per_s + 99 * 0.068 / 64, rel=0.02)


def test_capacity_is_where_the_slowest_stage_has_no_time_left() -> None:
    """64 sequences in 4 micro-batches of 16: a cycle lasts 4 * 36 ms, and a prompt adds 120 ms less one token's 21."""
    four = predict(times(4, token_s=0.004, hop_s=0.0, kv_tokens=64 * 200), CALM)
    assert four.max_batch == 64
    assert four.capacity_per_s == pytest.approx(1 / (99 * 0.144 / 64 + 0.099))
    assert four.capacity_tokens_per_s == pytest.approx(100 * four.capacity_per_s)


def test_stages_that_share_cores_are_no_faster_than_the_cores() -> None:
    shared = replace(times(8, hop_s=0.0), stages_at_once=2)
    assert predict(shared, CALM).capacity_per_s < 0.5 * predict(times(8, hop_s=0.0), CALM).capacity_per_s


def test_stages_that_disturb_each_other_do_so_once_several_micro_batches_run() -> None:
    apart = times(2, hop_s=0.0, kv_tokens=64 * 200)
    disturbed = replace(apart, stages_beside=(stage(0.08, 0.0),) * 2)
    one = replace(CALM, output_tokens_mean=2, rate_per_s=1e-6)
    assert predict(disturbed, one).tpot_s == pytest.approx(predict(apart, one).tpot_s)
    assert predict(disturbed, CALM).capacity_per_s == pytest.approx(predict(apart, CALM).capacity_per_s / 2)
    with pytest.raises(ValueError, match="2 stages cannot have 1 times beside others"):
        replace(apart, stages_beside=(stage(0.08, 0.0),))


def test_a_long_prompt_runs_in_chunks_that_overlap_in_the_pipeline() -> None:
    long = replace(CALM, prompt_tokens_mean=2048, output_tokens_mean=1)
    one = predict(times(1, call_s=0, token_s=1e-3), long)
    four = predict(times(4, call_s=0, token_s=1e-3, hop_s=0), long)
    assert one.ttft_s == pytest.approx(2.048, rel=0.05)
    assert four.ttft_s == pytest.approx(0.512 + 3 * 0.128, rel=0.05)


def test_more_kv_cache_means_more_at_once() -> None:
    small = predict(times(2, kv_tokens=400), CALM)
    assert small.max_batch == 2
    assert predict(times(2, kv_tokens=4000), CALM).capacity_per_s > 5 * small.capacity_per_s


def test_a_request_that_does_not_fit_is_never_served() -> None:
    nothing = predict(times(2, kv_tokens=100), CALM, Slo(ttft_s=1))
    assert (nothing.max_batch, nothing.goodput_per_s, nothing.capacity_per_s, nothing.load) == (0, 0.0, 0.0, inf)


def test_above_capacity_the_queue_grows_and_the_best_share_is_let_in() -> None:
    flood = replace(CALM, rate_per_s=1000.0)
    answer = predict(times(4), flood, Slo(ttft_s=2.0))
    assert answer.is_saturated
    assert isinf(answer.ttft_s)
    assert 0.5 * answer.capacity_per_s < answer.goodput_per_s <= answer.capacity_per_s
    assert answer.throughput_tokens_per_s == pytest.approx(answer.capacity_tokens_per_s)


def test_a_target_below_the_time_of_one_step_is_never_met() -> None:
    assert predict(times(4), CALM, Slo(tpot_s=0.01)).goodput_per_s == 0
    assert predict(times(4), CALM, Slo(ttft_s=0.01)).goodput_per_s == 0
    assert predict(times(4), CALM, Slo(ttft_s=1, tpot_s=0.1)).goodput_per_s == pytest.approx(0.001, rel=1e-3)


def test_replicas_share_the_work() -> None:
    busy = replace(CALM, rate_per_s=5.0)
    one, two = predict(times(2), busy), predict(times(2), busy, replicas=2)
    assert two.capacity_per_s == pytest.approx(2 * one.capacity_per_s)
    assert two.load == pytest.approx(one.load / 2)
    assert two.batch < one.batch


def test_bursts_favour_the_pipeline_with_more_room() -> None:
    """FlexPipe's point: few stages answer sooner in calm traffic, many stages absorb bursts."""
    few = times(4, call_s=0.28, hop_s=0.0021, kv_tokens=16 * 200)
    many = times(16, call_s=0.30, hop_s=0.0021, kv_tokens=64 * 200)
    workload = replace(CALM, rate_per_s=0.2)
    slo = Slo(ttft_s=3.0)
    calm = [predict(each, replace(workload, cv=0.1, rate_per_s=0.02), slo) for each in (few, many)]
    burst = [predict(each, replace(workload, cv=6.0), slo) for each in (few, many)]
    assert calm[0].ttft_s < calm[1].ttft_s
    assert burst[0].goodput_per_s < burst[1].goodput_per_s
    first, second = best_cvs([few, many], workload, slo)
    assert first is not None
    assert second is not None
    assert first < second


def test_a_candidate_that_serves_nothing_is_best_at_no_cv() -> None:
    assert best_cvs([times(1), times(2, kv_tokens=10)], CALM, Slo())[1] is None
    assert best_cvs([times(1)], CALM, Slo())[0] is not None


@pytest.mark.parametrize("hops", [0, 2])
def test_hops_lie_between_stages(hops: int) -> None:
    with pytest.raises(ValueError, match=f"2 stages cannot have {hops} hops"):
        replace(times(2), hops=(lambda _tokens: 0.0,) * hops)


@given(
    stages=st.integers(1, 32),
    call_s=st.floats(1e-5, 1.0),
    token_s=st.floats(0, 1e-2),
    rate=st.floats(1e-3, 1e3),
    cv=st.floats(0, 8),
    prompt=st.floats(1, 5000),
    output=st.floats(1, 5000),
    ttft=st.none() | st.floats(1e-3, 10),
    tpot=st.none() | st.floats(1e-3, 1),
    kv_tokens=st.integers(1, 1_000_000),
)
def test_whatever_is_asked_the_answer_is_consistent(
    stages: int,
    call_s: float,
    token_s: float,
    rate: float,
    cv: float,
    prompt: float,
    output: float,
    ttft: float | None,
    tpot: float | None,
    kv_tokens: int,
) -> None:
    pipeline = times(stages, call_s=call_s, token_s=token_s, kv_tokens=kv_tokens)
    workload = Workload(rate_per_s=rate, cv=cv, prompt_tokens_mean=prompt, output_tokens_mean=output)
    answer = predict(pipeline, workload, Slo(ttft_s=ttft, tpot_s=tpot))
    assert 0 <= answer.attainment <= 1
    assert 0 <= answer.goodput_per_s <= min(rate, answer.capacity_per_s) + 1e-9
    assert 0 <= answer.batch <= answer.max_batch
    assert answer.ttft_s > 0
    assert answer.ttft_p99_s >= 0
    assert answer.is_saturated == (rate >= answer.capacity_per_s)
    if answer.max_batch:
        assert answer.tpot_s >= call_s * (1 - 1e-9)
    easier = predict(pipeline, workload, Slo(ttft_s=ttft))
    assert easier.goodput_per_s >= answer.goodput_per_s - 1e-9
