"""What is measured, and that what cannot be read is absent."""

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engines.protocol import EngineCounters
from flexpiped.api.metrics import Endpoint, Metrics, percentiles_of
from flexpiped.api.outcomes import Outcome
from flexpiped.status import Percentiles

COUNTERS = EngineCounters(
    running=1,
    waiting=2,
    kv_blocks_used=3,
    kv_blocks_capacity=4,
    kv_block_tokens=16,
    prompt_tokens_total=5,
    generated_tokens_total=6,
    preemptions_total=7,
    steps_total=8,
    worker_restarts_total=9,
    refactorings_total=10,
    prefix_queried_tokens_total=12,
    prefix_hit_tokens_total=11,
    kv_blocks_cached=13,
)


def samples_of(metrics: Metrics, counters: EngineCounters | None = None) -> dict[str, float]:
    text = metrics.render(counters).decode()
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_request_is_timed() -> None:
    times_s = iter([10.0, 10.5, 11.5])
    metrics = Metrics(clock=lambda: next(times_s))
    with metrics.observe(Endpoint.CHAT) as observation:
        observation.prompt_tokens = 4
        observation.tokens(1)
        observation.tokens(11)
        observation.outcome = Outcome.DONE
    samples = samples_of(metrics)
    assert samples["flexpiped_requests_total[chat][done]"] == 1
    assert samples["flexpiped_requests_in_flight"] == 0
    assert samples["flexpiped_request_prompt_tokens_total"] == 4
    assert samples["flexpiped_request_completion_tokens_total"] == 11
    assert samples["flexpiped_time_to_first_token_seconds_sum"] == 0.5
    assert samples["flexpiped_time_per_output_token_seconds_sum"] == pytest.approx(0.1)
    latencies = metrics.latencies()
    assert latencies.ttft == Percentiles(p50_s=0.5, p99_s=0.5)


def test_a_scope_left_early_counts_as_disconnected() -> None:
    metrics = Metrics()
    with pytest.raises(KeyError), metrics.observe(Endpoint.COMPLETIONS):
        raise KeyError
    samples = samples_of(metrics)
    assert samples["flexpiped_requests_total[completions][disconnected]"] == 1
    assert samples["flexpiped_time_to_first_token_seconds_count"] == 0
    assert metrics.latencies().ttft is None


def test_the_engines_counters_are_shown_when_there_are_any() -> None:
    metrics = Metrics()
    assert not any(name.startswith("flexpiped_engine") for name in samples_of(metrics))
    samples = samples_of(metrics, COUNTERS)
    assert samples["flexpiped_engine_running_requests"] == 1
    assert samples["flexpiped_engine_kv_blocks_used"] == 3
    assert samples["flexpiped_engine_generated_tokens_total"] == 6
    assert samples["flexpiped_engine_refactorings_total"] == 10
    hits, queries = "flexpiped_engine_prefix_hit_tokens_total", "flexpiped_engine_prefix_queried_tokens_total"
    assert (samples[hits], samples[queries], samples["flexpiped_engine_kv_blocks_cached"]) == (11, 12, 13)


def test_what_an_engine_does_not_tell_is_no_zero() -> None:
    names = ("prefix_queried_tokens_total", "prefix_hit_tokens_total", "kv_blocks_cached")
    samples = samples_of(Metrics(), replace(COUNTERS, **dict.fromkeys(names)))
    assert not any("prefix" in name or "cached" in name for name in samples)


def test_percentiles_are_nearest_rank() -> None:
    assert percentiles_of([]) is None
    assert percentiles_of([3.0, 1.0, 2.0]) == Percentiles(p50_s=2.0, p99_s=3.0)
    assert percentiles_of([float(i) for i in range(1, 201)]) == Percentiles(p50_s=100.0, p99_s=198.0)
