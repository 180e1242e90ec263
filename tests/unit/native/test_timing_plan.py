"""What a profile measures: layouts and batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.native.timing_plan import Limits, timed_batches, timed_layouts
from planner.layer_costs import Batch
from planner.profile_fit import fit_observations
from planner.profile_terms import Observation

EIGHT = tuple(f"cpu:{index}" for index in range(8))


def test_every_number_of_threads_is_measured_alone_and_beside_others() -> None:
    layouts = timed_layouts(device_ids=EIGHT, num_decoders=8, cores=2)
    assert [(each.pipeline.granularity, each.threads, each.in_flight) for each in layouts] == [
        (1, 2, 1),
        (2, 1, 1),
        (2, 1, 2),
        (8, 1, 1),
        (8, 1, 2),
    ]


def test_one_core_has_no_neighbours() -> None:
    layouts = timed_layouts(device_ids=EIGHT[:2], num_decoders=8, cores=1)
    assert [(each.pipeline.granularity, each.in_flight) for each in layouts] == [(1, 1), (2, 1)]


def test_devices_of_one_core_are_measured_with_one_thread() -> None:
    layouts = timed_layouts(device_ids=EIGHT[:2], num_decoders=8, cores=2, threads_per_device=1)
    assert [(each.pipeline.granularity, each.threads, each.in_flight) for each in layouts] == [
        (1, 1, 1),
        (2, 1, 1),
        (2, 1, 2),
    ]


@given(devices=st.integers(1, 16), decoders=st.integers(1, 40), cores=st.integers(1, 64))
def test_layouts_cover_what_an_engine_may_run(devices: int, decoders: int, cores: int) -> None:
    ids = tuple(f"cpu:{index}" for index in range(devices))
    layouts = timed_layouts(device_ids=ids, num_decoders=decoders, cores=cores)
    assert all(each.pipeline.num_decoders == decoders for each in layouts)
    assert all(1 <= each.in_flight <= min(cores, each.pipeline.granularity) for each in layouts)
    possible = {max(1, cores // stages) for stages in range(1, min(devices, decoders) + 1)}
    assert {each.threads for each in layouts} == possible


@given(
    seqs=st.integers(1, 256),
    tokens=st.integers(16, 4096),
    length=st.integers(16, 32768),
    blocks=st.integers(8, 10_000),
    size=st.sampled_from([1, 16, 100]),
    in_flight=st.integers(1, 8),
)
def test_batches_stay_within_what_the_engine_takes(
    seqs: int, tokens: int, length: int, blocks: int, size: int, in_flight: int
) -> None:
    limits = Limits(
        max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length, kv_blocks=blocks, kv_block_tokens=size
    )
    for batch in timed_batches(limits, in_flight=in_flight):
        assert batch.tokens <= tokens
        assert batch.sequences * in_flight <= seqs or batch.tokens > batch.sequences
        assert batch.context_tokens / batch.sequences <= length
        each = -(-int(batch.context_tokens) // batch.sequences // size)
        assert each * batch.sequences * in_flight <= blocks


def test_the_grid_has_decoding_prompts_and_later_pieces() -> None:
    limits = Limits(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=4096, kv_blocks=512, kv_block_tokens=16)
    batches = timed_batches(limits, in_flight=2)
    assert {batch.sequences for batch in batches if batch.tokens == batch.sequences} == {1, 2, 4, 8, 16, 32}
    whole = [batch.tokens for batch in batches if batch.context_tokens == batch.tokens > batch.sequences]
    assert whole == [4, 8, 16, 32, 64, 128, 256, 512]
    assert any(batch.tokens == 512 and batch.context_tokens == 2048 for batch in batches)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_small_kv_cache_still_gives_enough_to_fit(in_flight: int) -> None:
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128, kv_blocks=16, kv_block_tokens=16)
    batches = timed_batches(limits, in_flight=in_flight)
    stages = {1: ((8, True, True),), 2: ((4, True, False), (4, False, True))}[in_flight]
    (fit,) = fit_observations([_observed(batch, *stage) for batch in batches for stage in stages])
    assert fit.mean_residual < 0.01


def _observed(batch: Batch, decoders: int, has_embedding: bool, has_head: bool) -> Observation:
    return Observation(
        threads=1,
        beside_others=False,
        num_decoders=decoders,
        has_embedding=has_embedding,
        has_head=has_head,
        batch=batch,
        busy_s=1e-3 + decoders * (3e-4 + 1e-5 * batch.tokens + 1e-7 * batch.context_tokens),
    )
