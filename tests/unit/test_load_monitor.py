"""What engines and devices say, as the policy sees it."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from engines.closing import closing
from engines.fake import FakeEngine
from engines.protocol import GenerationRequest, SamplingParams
from flexpiped.load_monitor import LoadSampler, sample_of
from planner.arrivals import Absence
from planner.policy import decide, initial_state
from planner.policy_state import PolicyConstants
from tests.support.layouts import even_pipeline
from tests.unit.planner.policies import THREE
from topology.device import Device, DeviceKind
from topology.units import GIB

REQUEST = GenerationRequest(
    request_id="r", prompt_token_ids=tuple(range(1, 101)), sampling=SamplingParams(max_tokens=50, ignore_eos=True)
)


@pytest.fixture
async def engines() -> AsyncIterator[tuple[FakeEngine, FakeEngine]]:
    """Return one of two stages and one of one stage, with 64 KV blocks each."""
    two, one = (FakeEngine(pipeline=even_pipeline(stages), kv_blocks_capacity=64) for stages in (2, 1))
    for engine in (two, one):
        await engine.start(on_progress=lambda _: None)
    yield two, one
    for engine in (two, one):
        await engine.close()


async def test_what_all_engines_say_counts_together(engines: tuple[FakeEngine, FakeEngine]) -> None:
    two, one = engines
    load = LoadSampler(clock=lambda: 100.0)
    async with closing(one.generate(REQUEST)) as chunks:
        await anext(chunks)
        one.hold()
        await load.sample(two, one)
    seen = load.observe()
    assert (seen.running, seen.queue_length) == (1.0, 0.0)
    assert seen.kv_use == 7 / 64  # of the fullest: 100 tokens and one in blocks of 16
    assert seen.stage_busy == (Absence.NOT_YET,) * 3


async def test_a_stage_that_says_how_busy_it_is_is_believed(engines: tuple[FakeEngine, FakeEngine]) -> None:
    two, one = engines
    two.busy = {1: 0.75}
    one.busy = {0: 0.0}
    load = LoadSampler(clock=lambda: 100.0)
    await load.sample(two, one)
    seen = load.observe()
    assert seen.stage_busy == (Absence.NOT_YET, 0.75, 0.0)
    _state, decision = decide(initial_state([2], now_s=0.0), seen, THREE, 100.0, PolicyConstants())
    assert decision.numbers["busiest_stage"] == 0.75


async def test_an_engine_without_kv_blocks_says_nothing_of_their_use(engines: tuple[FakeEngine, FakeEngine]) -> None:
    counters = [replace(await engine.counters(), kv_blocks_capacity=0) for engine in engines]
    assert sample_of(counters, ()).kv_use is Absence.UNSUPPORTED


async def test_of_engines_that_are_gone_the_last_words_become_stale(engines: tuple[FakeEngine, FakeEngine]) -> None:
    now_s = [100.0]
    load = LoadSampler(clock=lambda: now_s[0])
    await load.sample(*engines)
    engines[0].kill("killed by a test")
    await load.sample(*engines)
    assert load.observe().queue_length == 0.0
    now_s[0] += 16.0
    assert load.observe().queue_length is Absence.STALE


def test_what_others_hold_of_the_devices_stands_in_the_numbers_of_a_decision() -> None:
    now_s = [100.0]
    load = LoadSampler(clock=lambda: now_s[0])

    def numbers() -> dict[str, float | str]:
        _state, decision = decide(initial_state([2], now_s=0.0), load.observe(), THREE, now_s[0], PolicyConstants())
        return {name: value for name, value in decision.numbers.items() if name.startswith("taken_bytes")}

    assert numbers() == {"taken_bytes": "not measured yet"}
    load.devices_seen([gpu("GPU-1", others=3 * GIB), gpu("GPU-2", others=0), gpu("GPU-3", others=GIB)])
    assert load.observe().taken_bytes == {"GPU-1": 3 * GIB, "GPU-2": 0, "GPU-3": GIB}
    assert numbers() == {"taken_bytes": 4 * GIB, "taken_bytes_GPU-1": 3 * GIB, "taken_bytes_GPU-3": GIB}
    now_s[0] += 16.0
    assert numbers() == {"taken_bytes": "not measured for a while"}


def test_the_gradient_of_each_window_stands_in_the_numbers_too() -> None:
    now_s = [0.0]
    load = LoadSampler(clock=lambda: now_s[0], windows_s=[10.0, 100.0])
    for request in range(20):
        now_s[0] += 0.75 if request < 10 else 0.25  # the second half of ten seconds begins at 5 s
        load.arrived(request)
    _state, decision = decide(initial_state([2], now_s=0.0), load.observe(), THREE, now_s[0], PolicyConstants())
    gradients = {name: value for name, value in decision.numbers.items() if name.startswith("gradient")}
    assert gradients == {
        "gradient_per_s2_10s": pytest.approx((14 - 6) / 5 / 5),
        "gradient_per_s2_100s": "not measured yet",
    }


def gpu(name: str, *, others: int) -> Device:
    return Device(
        id=name,
        kind=DeviceKind.CUDA,
        memory_total_bytes=8 * GIB,
        memory_reserved_bytes=others,
        memory_others_bytes=others,
    )
