"""Predictions against a simulation of one stage that batches continuously: the same times, requests one by one.

The simulated engine does what engines do: between two steps it admits whom its KV cache has room for; a step computes
the new prompts and one token for all others. Lengths and gaps are drawn at random with a fixed seed.
"""

import random
from dataclasses import dataclass, replace
from statistics import fmean

import pytest

from planner.prediction import PipelineTimes, predict
from planner.workload import Workload

CALL_S, PROMPT_TOKEN_S, TOKEN_S = 0.010, 0.00005, 0.0005
LENGTHS = Workload(prompt_tokens_mean=200, output_tokens_mean=100)


@dataclass(slots=True)
class Request:
    arrived_s: float
    prompt: int
    left: int
    first_s: float = 0.0
    ended_s: float = 0.0
    tokens: int = 0


def simulated(*, rate_per_s: float, cv: float, slots: int, count: int = 3000) -> tuple[float, float]:
    """Return the mean time to the first token and the mean time per further token, the first tenth left out."""
    draw = random.Random(1)
    waiting: list[Request] = []
    now_s = 0.0
    for _ in range(count):
        now_s += draw.gammavariate(1 / cv**2, cv**2 / rate_per_s)
        prompt, output = (1 + int(draw.expovariate(1 / (mean - 1))) for mean in (200, 100))
        waiting.append(Request(arrived_s=now_s, prompt=prompt, left=output, tokens=output))
    every, active, now_s = list(waiting), list[Request](), 0.0
    waiting.reverse()
    while waiting or active:
        if not active and waiting[-1].arrived_s > now_s:
            now_s = waiting[-1].arrived_s
        running = len(active)
        while waiting and len(active) < slots and waiting[-1].arrived_s <= now_s:
            active.append(waiting.pop())
        new = active[running:]
        now_s += CALL_S + running * TOKEN_S + sum(each.prompt for each in new) * PROMPT_TOKEN_S
        for each in new:
            each.first_s = now_s
        for each in active:
            each.left -= 1
            if each.left == 0:
                each.ended_s = now_s
        active = [each for each in active if each.left > 0]
    counted = every[count // 10 :]
    several = [each for each in counted if each.tokens > 1]
    tpot_s = sum(each.ended_s - each.first_s for each in several) / sum(each.tokens - 1 for each in several)
    return fmean(each.first_s - each.arrived_s for each in counted), tpot_s


def times(slots: int) -> PipelineTimes:
    return PipelineTimes(
        stages=(
            lambda batch: CALL_S + batch.tokens * (TOKEN_S if batch.tokens == batch.sequences else PROMPT_TOKEN_S),
        ),
        hops=(),
        kv_capacity_tokens=slots * 300,
        max_sequences=slots,
        max_step_tokens=100_000,
    )


@pytest.mark.parametrize(
    ("cv", "ttft", "tpot"),
    [(0.5, 0.1, 0.05), (1.0, 0.15, 0.05), (3.0, 0.5, 0.15)],  # bursts are predicted less exactly
)
@pytest.mark.parametrize("load", [0.2, 0.5, 0.75])
def test_an_engine_does_what_is_predicted(load: float, cv: float, ttft: float, tpot: float) -> None:
    slots = 64
    workload = replace(LENGTHS, rate_per_s=load * predict(times(slots), LENGTHS).capacity_per_s, cv=cv)
    predicted = predict(times(slots), workload)
    ttft_s, tpot_s = simulated(rate_per_s=workload.rate_per_s, cv=cv, slots=slots)
    assert predicted.ttft_s == pytest.approx(ttft_s, rel=ttft)
    assert predicted.tpot_s == pytest.approx(tpot_s, rel=tpot)


def test_an_engine_serves_what_its_capacity_is_predicted_to_be() -> None:
    """Just below it the queue does not grow; well above it, it does."""
    capacity = predict(times(16), LENGTHS).capacity_per_s
    below, _ = simulated(rate_per_s=0.9 * capacity, cv=1.0, slots=16)
    above, _ = simulated(rate_per_s=1.3 * capacity, cv=1.0, slots=16)
    assert below < 2
    assert above > 20
