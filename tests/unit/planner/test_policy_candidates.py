"""Candidates of the policy from pipelines of known times."""

from planner.layer_costs import Batch
from planner.policy_candidates import Granularity, candidates_for, similar
from planner.prediction import PipelineTimes
from planner.workload import Slo, Workload

LENGTHS = Workload(rate_per_s=2.0, prompt_tokens_mean=100, output_tokens_mean=50)


def of_stages(count: int) -> Granularity:
    """A model of 32 ms a step and 0.1 ms a token, evenly cut, with 2 ms a hop, each stage on a device of its own."""

    def stage(batch: Batch) -> float:
        return (0.032 + 1e-4 * batch.tokens) / count

    times = PipelineTimes(
        stages=(stage,) * count,
        hops=(lambda _tokens: 0.002,) * (count - 1),
        kv_capacity_tokens=10_000 * count,
        max_sequences=256,
        max_step_tokens=512,
    )
    return Granularity(num_stages=count, times=times, change_s=0.1, devices=count)


def test_more_stages_serve_more_and_take_longer_alone() -> None:
    found = candidates_for([of_stages(count) for count in (1, 2, 4, 8)], LENGTHS, Slo())
    assert [each.num_stages for each in found] == [1, 2, 4, 8]
    rates, latencies = [each.throughput_per_s for each in found], [each.latency_s for each in found]
    assert (rates, latencies) == (sorted(rates), sorted(latencies))
    assert all(each.best_cv is not None for each in found)


def test_a_candidate_predicts_what_it_would_do_at_a_rate() -> None:
    (one,) = candidates_for([of_stages(1)], LENGTHS, Slo())
    assert one.outlook is not None
    calm, busy = (one.outlook(share * one.throughput_per_s, 1.0) for share in (0.2, 0.9))
    assert calm.ttft_s < busy.ttft_s
    assert one.outlook(1.1 * one.throughput_per_s, 1.0).is_saturated


def test_what_serves_nothing_is_no_candidate() -> None:
    full = PipelineTimes(
        stages=(lambda _batch: 0.01,), hops=(), kv_capacity_tokens=10, max_sequences=8, max_step_tokens=8
    )
    assert candidates_for([Granularity(num_stages=1, times=full, change_s=0, devices=1)], LENGTHS, Slo()) == ()


def test_workloads_that_differ_little_are_one() -> None:
    near = Workload(rate_per_s=2.1, cv=3.0, prompt_tokens_mean=105, output_tokens_mean=48)
    far = Workload(rate_per_s=8.0, prompt_tokens_mean=100, output_tokens_mean=50)
    assert similar(near) == similar(LENGTHS)
    assert similar(far) != similar(LENGTHS)
