"""Profiles: what is fitted to made-up measurements, what is asked of it, and its file."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from planner.errors import InvalidProfile
from planner.layer_costs import Batch, decode_batch, layer_classes, prefill_batch, stage_s
from planner.model_graph import ModelGraph
from planner.profile import (
    HIGH_RESIDUAL,
    Fit,
    MeasuredCosts,
    Profile,
    ProfileKey,
)
from planner.profile_file import parse_profile, profile_to_json
from planner.profile_fit import fit_observations, non_negative_least_squares
from planner.profile_terms import TOKEN_SPANS, Observation, Term
from tests.support.graphs import graph_of
from topology.device import Device, DeviceKind

TRUTH = {
    Term.STAGE_STEP: 1e-4,
    Term.STAGE_TOKEN: 1e-7,
    Term.EMBEDDING_TOKEN: 2e-7,
    Term.DECODER_CALL: 3e-4,
    Term.DECODER_TOKEN_TO_2: 2e-4,
    Term.DECODER_TOKEN_TO_4: 6e-5,
    Term.DECODER_TOKEN_TO_8: 4e-5,
    Term.DECODER_TOKEN_TO_16: 3e-5,
    Term.DECODER_TOKEN_TO_32: 1.5e-5,
    Term.DECODER_TOKEN_TO_64: 1e-5,
    Term.DECODER_TOKEN_TO_128: 1.1e-5,
    Term.DECODER_TOKEN_FROM_128: 1.2e-5,
    Term.DECODER_CONTEXT: 5e-8,
    Term.DECODER_CONTEXT_ALONE: 1e-8,
    Term.DECODER_PAIR: 3e-8,
    Term.HEAD_CALL: 5e-4,
    Term.HEAD_SEVERAL: 3e-4,
    Term.HEAD_ROW: 4e-5,
}
BATCHES = [
    *(decode_batch(sequences=n, context_tokens=c) for n in (1, 2, 4, 8, 16, 32) for c in (16, 256, 1024)),
    *(prefill_batch(tokens=n) for n in (4, 16, 64, 256, 512)),
    prefill_batch(tokens=128, context_tokens=1024),
]
KEY = ProfileKey(
    model="0123456789abcdef", dtype="float32", engine="native", device_kind=DeviceKind.CPU,
    device_name="Some CPU", cores=2, torch_version="2.13.0",
)  # fmt: skip
GRAPH: ModelGraph = graph_of()


def observed(*, noise: float = 0.0, threads: int = 1, beside: bool = False, factor: float = 1.0) -> list[Observation]:
    """Return what stages of 8, 4 and 1 decoders would take if ``TRUTH`` were true, with relative noise."""
    random = np.random.default_rng(1)
    stages = ((8, True, True), (4, True, False), (4, False, True), (1, False, False))
    made = [
        Observation(
            threads=threads,
            beside_others=beside,
            num_decoders=decoders,
            has_embedding=first,
            has_head=last,
            batch=batch,
            busy_s=1.0,
        )
        for decoders, first, last in stages
        for batch in BATCHES
    ]
    true = [factor * sum(TRUTH[term] * amount for term, amount in each.amounts().items()) for each in made]
    return [
        replace(each, busy_s=time * (1 + noise * float(random.standard_normal())))
        for each, time in zip(made, true, strict=True)
    ]


def profile_of(*observations: Observation) -> Profile:
    return Profile(
        key=KEY,
        model_name="small-llama",
        measured_at="2026-01-02 03:04 UTC",
        decoder_weight_bytes=GRAPH.decoders[0].weight_bytes,
        fits=fit_observations(observations),
    )


def cpu(threads: int = 1, name: str = "") -> Device:
    return Device(id="cpu:0", kind=DeviceKind.CPU, memory_total_bytes=1, threads=threads, name=name)


def test_what_was_put_in_is_found_again() -> None:
    (fit,) = fit_observations(observed())
    assert fit.mean_residual < 1e-6
    assert dict(fit.seconds) == pytest.approx(TRUTH, rel=1e-3)


def test_noise_averages_out_and_stays_in_the_residuals() -> None:
    (fit,) = fit_observations(observed(noise=0.1))
    assert 0.05 < fit.mean_residual < 0.12
    assert len(fit.residuals) == 4 * len(BATCHES)
    for each in observed():
        assert fit.time_s(each.amounts()) == pytest.approx(each.busy_s, rel=0.15)


def test_threads_and_neighbours_have_fits_of_their_own() -> None:
    profile = profile_of(*observed(), *observed(beside=True, factor=1.4), *observed(threads=4, factor=0.5))
    assert [(fit.threads, fit.beside_others) for fit in profile.fits] == [(1, False), (1, True), (4, False)]
    alone, beside = MeasuredCosts(profile=profile), MeasuredCosts(profile=profile, beside_others=True)
    batch, classes = decode_batch(sequences=8, context_tokens=100), layer_classes(GRAPH.layers)
    one = stage_s(alone, classes, cpu(), batch)
    assert stage_s(beside, classes, cpu(), batch) == pytest.approx(1.4 * one, rel=1e-3)
    assert stage_s(alone, classes, cpu(4), batch) == pytest.approx(0.5 * one, rel=1e-3)
    assert stage_s(beside, classes, cpu(3), batch) == pytest.approx(0.5 * one, rel=1e-3)  # the nearest there is


def test_a_stage_costs_what_the_terms_say() -> None:
    costs = MeasuredCosts(profile=profile_of(*observed()))
    batch = Batch(tokens=32, sequences=4, context_tokens=400)
    expected = (
        TRUTH[Term.STAGE_STEP]
        + 32 * (TRUTH[Term.STAGE_TOKEN] + TRUTH[Term.EMBEDDING_TOKEN])
        + 8 * (TRUTH[Term.DECODER_CALL] + TRUTH[Term.DECODER_TOKEN_TO_2] + 2 * TRUTH[Term.DECODER_TOKEN_TO_4])
        + 8 * (4 * TRUTH[Term.DECODER_TOKEN_TO_8] + 8 * TRUTH[Term.DECODER_TOKEN_TO_16])
        + 8 * 16 * TRUTH[Term.DECODER_TOKEN_TO_32]
        + 8 * 400 * TRUTH[Term.DECODER_CONTEXT]
        + 8 * batch.attended() * TRUTH[Term.DECODER_PAIR]
        + TRUTH[Term.HEAD_CALL]
        + TRUTH[Term.HEAD_SEVERAL]
        + 4 * TRUTH[Term.HEAD_ROW]
    )
    assert stage_s(costs, layer_classes(GRAPH.layers), cpu(), batch) == pytest.approx(expected, rel=1e-3)


def test_the_source_says_when_where_and_how_well() -> None:
    assert MeasuredCosts(profile=profile_of(*observed())).source == (
        "measured 2026-01-02 03:04 UTC on Some CPU, native engine, torch 2.13.0 (mean residual 0.0%)"
    )


def test_high_residuals_are_said_wherever_the_times_are_used() -> None:
    profile = profile_of(*observed(), *observed(noise=0.3, threads=2))
    share = profile.fits[1].mean_residual
    assert share > HIGH_RESIDUAL
    assert profile.warning == (
        f"warning: mean residual {share:.1%} for stages of 2 threads alone: above 10%, so predictions may be as far "
        "off; measure again while nothing else runs"
    )
    assert MeasuredCosts(profile=profile).source == f"{profile.origin}; {profile.warning}"
    assert profile_of(*observed(noise=0.05)).warning == ""


def test_another_device_or_model_is_refused() -> None:
    costs = MeasuredCosts(profile=profile_of(*observed()))
    batch = decode_batch(sequences=1, context_tokens=1)
    gpu = Device(id="GPU-1", kind=DeviceKind.CUDA, memory_total_bytes=1, name="H100")
    with pytest.raises(InvalidProfile, match="measured on Some CPU, not on H100"):
        costs.stage_overhead_s(gpu, batch)
    with pytest.raises(InvalidProfile, match="not on Other CPU"):
        costs.stage_overhead_s(cpu(name="Other CPU"), batch)
    other = replace(GRAPH.decoders[0], weight_bytes=5)
    with pytest.raises(InvalidProfile, match="decoder 0 has 5"):
        costs.layer_s(other, cpu(), batch)


def test_too_few_measurements_are_refused() -> None:
    with pytest.raises(InvalidProfile, match="nothing was measured"):
        fit_observations([])
    with pytest.raises(InvalidProfile, match="3 measurements with 1 threads cannot tell 9 terms apart"):
        fit_observations(observed()[:3])


def test_tokens_between_and_beyond_what_was_measured_have_the_price_of_their_neighbours() -> None:
    made = [each for each in observed() if each.batch.tokens in (1, 8, 32)]
    (fit,) = fit_observations(made)
    price = {term: fit.seconds[term] for term, _, _ in TOKEN_SPANS}
    assert price[Term.DECODER_TOKEN_TO_2] == price[Term.DECODER_TOKEN_TO_4] == price[Term.DECODER_TOKEN_TO_8]
    assert price[Term.DECODER_TOKEN_TO_16] == price[Term.DECODER_TOKEN_TO_32]
    assert len({price[term] for term, beyond, _ in TOKEN_SPANS if beyond >= 8}) == 1
    for each in made:
        assert fit.time_s(each.amounts()) == pytest.approx(each.busy_s, rel=1e-3)


@given(
    arrays(np.float64, (12, 4), elements=st.floats(-10, 10)),
    arrays(np.float64, 12, elements=st.floats(-10, 10)),
)
def test_least_squares_are_never_negative_and_no_step_improves_them(
    matrix: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]",
    target: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]",
) -> None:
    found = non_negative_least_squares(matrix, target)
    assert (found >= 0).all()

    def error(at: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> float:
        return float(np.linalg.norm(matrix @ at - target))

    best = error(found)
    for column in range(4):
        size = float(np.linalg.norm(matrix[:, column]))
        if size < 1e-3:
            continue
        for step in (1e-3 / size, -1e-3 / size):
            moved = found.copy()
            moved[column] = max(0.0, moved[column] + step)
            assert error(moved) >= best - 1e-6


def test_a_file_brings_back_what_was_kept() -> None:
    profile = profile_of(*observed(noise=0.05), *observed(threads=2))
    assert parse_profile(json.dumps(profile_to_json(profile))) == profile
    bound = replace(profile, key=replace(KEY, threads_per_device=1))
    assert parse_profile(json.dumps(profile_to_json(bound))) == bound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, r"profile\.version must be 2, not 1: measure again with flexctl profile"),
        ({"model_name": 5}, r"profile\.model_name must be text, not 5"),
        ({"fits": {}}, r"profile\.fits must be a list"),
        ({"fits": [1]}, r"profile\.fits\[0\] must be an object"),
        ({"strange": 1}, r"profile has an unknown key 'strange'"),
        ({"key": {}}, r"profile\.key\.device_kind must be text"),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_name(change: dict[str, object], message: str) -> None:
    good = profile_to_json(profile_of(*observed()))
    with pytest.raises(InvalidProfile, match=message):
        parse_profile(json.dumps(good | change))


def test_a_fit_with_negative_or_missing_terms_is_refused() -> None:
    profile = profile_of(*observed())
    broken = replace(profile, fits=(replace(profile.fits[0], seconds={**TRUTH, Term.HEAD_ROW: -1.0}),))
    with pytest.raises(InvalidProfile, match="less than no time"):
        parse_profile(json.dumps(profile_to_json(broken)))
    with pytest.raises(InvalidProfile, match="must be JSON"):
        parse_profile("{")
    values = json.loads(json.dumps(profile_to_json(profile)))
    del values["fits"][0]["seconds"][Term.HEAD_ROW.value]
    with pytest.raises(InvalidProfile, match="head, each row of logits must be a number"):
        parse_profile(json.dumps(values))


def test_a_fit_knows_its_mean_residual() -> None:
    assert Fit(threads=1, beside_others=False, seconds=TRUTH, residuals=(0.1, -0.3)).mean_residual == 0.2
