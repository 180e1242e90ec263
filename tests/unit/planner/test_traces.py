"""Traces: both formats, what is wrong with a line, gamma arrivals, and fitting a trace to a server."""

import json
import time

import pytest

from planner.errors import InvalidTrace
from planner.traces import (
    Reshape,
    TraceRequest,
    alternating,
    drawn_trace,
    parse_trace,
    repeated,
    reshaped,
    workload_of,
)
from planner.workload import Workload
from tests.support.traces import TRACE_SKIPPED, trace_folder

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
THREE = tuple(
    TraceRequest(arrival_s=at_s, prompt_tokens=100, output_tokens=tokens)
    for at_s, tokens in ((0.0, 10), (2.0, 20), (6.0, 1000))
)


def test_azure_lines_are_ordered_and_count_from_the_first() -> None:
    text = f"{AZURE}2023-11-16 18:17:05.0000000,3,4\n2023-11-16 18:17:03.5000000,4808,10\n"

    assert parse_trace(text) == (
        TraceRequest(arrival_s=0.0, prompt_tokens=4808, output_tokens=10),
        TraceRequest(arrival_s=1.5, prompt_tokens=3, output_tokens=4),
    )


def test_mooncake_lines() -> None:
    rows = [
        {"timestamp": 27000, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]},
        {"timestamp": 30500, "input_length": 10, "output_length": 0},
    ]

    assert parse_trace("\n".join(map(json.dumps, rows))) == (
        TraceRequest(arrival_s=0.0, prompt_tokens=6955, output_tokens=52, prefix_ids=(46, 47)),
        TraceRequest(arrival_s=3.5, prompt_tokens=10, output_tokens=1),
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "column TIMESTAMP is missing"),
        (AZURE, "there is no request in it"),
        (f"{AZURE}yesterday,3,4\n", "line 2: Invalid isoformat string"),
        (f"{AZURE}2023-11-16 18:17:03.5,3\n", "line 2: invalid literal"),
        (f"{AZURE}2023-11-16 18:17:03.5,-3,4\n", "line 2: a length cannot be -3"),
        ("TIMESTAMP,Tokens\n1,2\n", "column ContextTokens is missing"),
        ('{"timestamp": 1, "input_length": 2}\n', "line 1: output_length is missing"),
        ('{"timestamp": 1, "input_length": 2, "output_length": 3}\n{"time', "line 2"),
        ('{"timestamp": NaN, "input_length": 2, "output_length": 3}', "the time is no number"),
        ('{"timestamp": 1, "input_length": "many", "output_length": 3}', "line 1: invalid literal"),
        ('{"timestamp": -1, "input_length": 2, "output_length": 3}', "line 1: a time cannot be -1 ms"),
        ('{"timestamp": 1, "input_length": 1e30, "output_length": 3}', "line 1: invalid literal"),
        (f'{{"timestamp": 1, "input_length": 1{"0" * 30}, "output_length": 3}}', r"line 1: a length of 1e\+30 tokens"),
        (f'{{"timestamp": 1{"0" * 400}, "input_length": 2, "output_length": 3}}', "line 1: int too large"),
        ('{"timestamp": 1, "input_length": 2, "output_length": 3}\n[1]', "line 2"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, reason: str) -> None:
    with pytest.raises(InvalidTrace, match=reason):
        parse_trace(text)


def mooncake(*times_ms: float) -> str:
    return "\n".join(json.dumps({"timestamp": at, "input_length": 2, "output_length": 3}) for at in times_ms)


def test_times_in_different_units_are_named_by_their_line() -> None:
    """Two lines count from the start and the others from 1970, or one comes centuries later."""
    epoch_ms = 1_700_000_000_000
    with pytest.raises(InvalidTrace, match=r"line 1: it comes 19,676 days after the request of line 3, the one before"):
        parse_trace(mooncake(epoch_ms, epoch_ms + 500, 1000, 0))
    with pytest.raises(InvalidTrace, match=r"line 2: .* a trace lasts 366 days at most: is a time in another unit"):
        parse_trace(mooncake(0, 1e308))
    with pytest.raises(InvalidTrace, match=r"line 3: it comes 2,913,219 days after the request of line 2"):
        parse_trace(f"{AZURE}2023-11-16 18:17:03,3,4\n9999-12-31 23:59:59,3,4\n")
    apart = parse_trace(mooncake(epoch_ms + 86_400_000, epoch_ms))
    assert [each.arrival_s for each in apart] == [0.0, 86_400.0]


def test_times_of_an_azure_trace_are_alike_wherever_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where clocks go back an hour in between, and with an offset behind the fraction, as the trace of 2024 has it."""
    text = f"{AZURE}2023-10-29 00:30:00.0000000,3,4\n2023-10-29 04:30:00.0000000,3,4\n"
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert [each.arrival_s for each in parse_trace(text)] == [0.0, 4 * 3600.0]
        offset = f"{AZURE}2024-05-10 02:00:00.500000+02:00,3,4\n2024-05-10 00:00:01.500000+00:00,3,4\n"
        assert [each.arrival_s for each in parse_trace(offset)] == [0.0, 1.0]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_no_speed_makes_a_trace_last_for_years() -> None:
    for speed in (1e-9, 1e-300):
        with pytest.raises(InvalidTrace, match=r"times its speed it lasts .* days, and a trace lasts 366 days at most"):
            reshaped(THREE, Reshape(speed=speed))


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 4.0])
def test_drawn_arrivals_have_the_rate_and_cv(cv: float) -> None:
    wanted = Workload(rate_per_s=20.0, cv=cv, prompt_tokens_mean=300, prompt_tokens_cv=0.5, output_tokens_mean=50)

    found = workload_of(drawn_trace(wanted, duration_s=3000.0, seed=1))

    assert found.rate_per_s == pytest.approx(20.0, rel=0.07)
    assert found.cv == pytest.approx(cv, rel=0.06, abs=1e-6)
    assert found.prompt_tokens_mean == pytest.approx(300, rel=0.02)
    assert found.output_tokens_cv == pytest.approx(1.0, rel=0.03)


def test_the_seed_decides_what_is_drawn() -> None:
    first, again, other = (drawn_trace(Workload(rate_per_s=5), duration_s=30, seed=seed) for seed in (1, 1, 2))

    assert first == again
    assert first != other


def test_no_more_is_drawn_than_there_is_memory_for() -> None:
    with pytest.raises(InvalidTrace, match=r"1e\+09 requests/s for 60 s are 6e\+10 requests: at most 20,000,000"):
        drawn_trace(Workload(rate_per_s=1e9), duration_s=60, seed=1)


def test_fitting_a_trace() -> None:
    fitted = reshaped(THREE, Reshape(speed=2.0, prompt_scale=0.1, max_output_tokens=50, skip_s=1.0))

    assert [(each.arrival_s, each.prompt_tokens, each.output_tokens) for each in fitted] == [(0, 10, 20), (2, 10, 50)]
    assert len(reshaped(THREE, Reshape(duration_s=5.0))) == 2
    assert len(reshaped(THREE, Reshape(limit=1))) == 1
    with pytest.raises(InvalidTrace, match="no request is left"):
        reshaped(THREE, Reshape(skip_s=10.0))


def test_a_cv_as_good_as_none_draws_what_none_does_and_one_beyond_drawing_is_refused() -> None:
    even, hardly = (drawn_trace(Workload(rate_per_s=5, cv=cv), duration_s=9, seed=1) for cv in (0.0, 1e-300))

    assert [each.arrival_s for each in hardly] == [each.arrival_s for each in even]
    with pytest.raises(InvalidTrace, match=r"a CV of 1e\+200 cannot be drawn"):
        drawn_trace(Workload(prompt_tokens_cv=1e200), duration_s=9, seed=1)


def test_a_trace_again_from_its_beginning() -> None:
    found = repeated(THREE, duration_s=20.0)

    assert [each.arrival_s for each in found] == [0.0, 2.0, 6.0, 9.0, 11.0, 15.0, 18.0]


def test_two_traces_in_turns() -> None:
    other = tuple(TraceRequest(arrival_s=at_s, prompt_tokens=1, output_tokens=1) for at_s in (0.5, 3.5, 4.5, 7.0))

    assert [each.arrival_s for each in alternating(THREE, other, every_s=3.0)] == [0.0, 2.0, 3.5, 4.5, 6.0]


@pytest.mark.skipif(trace_folder() is None, reason=TRACE_SKIPPED)
@pytest.mark.parametrize(("name", "count", "cv"), [("conv", 19_366, 1.09), ("code", 8_819, 13.15)])
def test_the_azure_traces(name: str, count: int, cv: float) -> None:
    folder = trace_folder()
    assert folder is not None
    trace = parse_trace((folder / f"azure_llm_2023_{name}.csv").read_text())

    assert len(trace) == count
    assert workload_of(trace).cv == pytest.approx(cv, abs=0.01)
