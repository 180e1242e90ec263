"""The supervised engine dies and comes back; requests go on as if nothing had happened."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from engines.closing import closing
from engines.errors import EngineClosed, EngineDied, EngineStartFailed, InvalidRequest
from engines.fake import FAKE_CAPABILITIES, FakeEngine
from engines.fake_batch import NextToken
from engines.protocol import FinishReason, GenerationRequest, SamplingParams
from engines.restarts import GiveUp, Restart, RestartPolicy
from flexpiped.supervision import (
    INITIAL,
    CloseAsked,
    Died,
    Started,
    Succeeded,
    SuccessorLost,
    Supervision,
    SupervisorState,
    finish_of,
    step,
)
from flexpiped.supervisor import Supervisor
from planner.layout import Pipeline, pipeline_of
from tests.support.until import until

ONE = pipeline_of(device_ids=["cpu:0"], cuts=[], num_decoders=8)
TWO = pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[4], num_decoders=8)
POLICY = RestartPolicy(max_deaths=3, window_s=60.0, first_delay_s=1.0, max_delay_s=8.0)
REQUEST = GenerationRequest(
    request_id="r",
    prompt_token_ids=(5, 6, 7),
    sampling=SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True),
)


class GatedEngine(FakeEngine):
    """A fake engine whose start waits for a gate, where it has one."""

    def __init__(self, gate: asyncio.Event | None, **options: Any) -> None:
        super().__init__(**options)
        self._gate = gate

    async def start(self, *, on_progress: Callable[[str], None]) -> None:
        if self._gate is not None:
            on_progress("waiting for the gate")
            await self._gate.wait()
        await super().start(on_progress=on_progress)


class Workshop:
    """Makes fake engines and remembers them; time passes only when someone sleeps."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.pipelines: list[Pipeline] = []
        self.start_failures: list[str | None] = []
        self.now_s = 0.0
        self.slept_s: list[float] = []
        self.changes: list[Supervision] = []
        self.next_token: NextToken | None = None
        self.gate: asyncio.Event | None = None  # what engines that start wait for

    def make(self, pipeline: Pipeline, epoch: int) -> FakeEngine:
        self.pipelines.append(pipeline)
        failure = self.start_failures.pop(0) if self.start_failures else None
        self.engines.append(
            GatedEngine(self.gate, pipeline=pipeline, epoch=epoch, start_failure=failure, next_token=self.next_token)
        )
        return self.engines[-1]

    async def sleep(self, duration_s: float) -> None:
        self.slept_s.append(duration_s)
        self.now_s += duration_s
        await asyncio.sleep(0)


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture
async def supervisor(workshop: Workshop) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(
        factory=workshop.make,
        pipeline=ONE,
        policy=POLICY,
        clock=lambda: workshop.now_s,
        sleep=workshop.sleep,
        on_change=workshop.changes.append,
    )
    await supervisor.start()
    yield supervisor
    await supervisor.close()


async def tokens_of(supervisor: Supervisor, request: GenerationRequest = REQUEST) -> tuple[int, ...]:
    return tuple(token for chunk in [c async for c in supervisor.generate(request)] for token in chunk.token_ids)


async def undisturbed() -> tuple[int, ...]:
    engine = FakeEngine(pipeline=ONE)
    await engine.start(on_progress=lambda _message: None)
    tokens = [token async for chunk in engine.generate(REQUEST) for token in chunk.token_ids]
    await engine.close()
    return tuple(tokens)


async def collect(supervisor: Supervisor, on_token: Callable[[int], None]) -> tuple[int, ...]:
    tokens: list[int] = []
    async with closing(supervisor.generate(REQUEST)) as chunks:
        async for chunk in chunks:
            tokens.extend(chunk.token_ids)
            on_token(len(tokens))
    return tuple(tokens)


# The pure part.


def test_a_death_then_recovery_then_the_end() -> None:
    ready, nothing = step(INITIAL, Started(), now_s=0.0, policy=POLICY)
    assert (ready.state, nothing) == (SupervisorState.READY, None)
    recovering, decision = step(ready, Died(reason="out of memory"), now_s=1.0, policy=POLICY)
    assert (recovering.state, decision) == (SupervisorState.RECOVERING, Restart(after_s=1.0))
    assert recovering.reason == "the engine died (out of memory) and is started again in 1 s; requests wait"
    recovering, decision = step(recovering, Died(reason="again"), now_s=2.0, policy=POLICY)
    assert decision == Restart(after_s=2.0)
    failed, decision = step(recovering, Died(reason="no device"), now_s=3.0, policy=POLICY)
    assert isinstance(decision, GiveUp)
    assert failed.reason == "the engine died 3 times within 60 s, at last: no device"
    assert (failed.state, failed.deaths_total) == (SupervisorState.FAILED, 3)
    closing_state, _decision = step(failed, CloseAsked(reason="the daemon is shutting down"), now_s=4.0, policy=POLICY)
    assert closing_state.state is SupervisorState.CLOSING


def test_a_second_instance_takes_the_place_of_one_that_serves_or_has_died() -> None:
    ready, _ = step(INITIAL, Started(), now_s=0.0, policy=POLICY)
    succeeded, decision = step(ready, Succeeded(epoch=4), now_s=1.0, policy=POLICY)
    assert (succeeded.state, decision) == (SupervisorState.READY, None)
    assert succeeded.reason == "the second instance serves, epoch 4"
    died, decision = step(ready, Died(reason="killed", has_successor=True), now_s=1.0, policy=POLICY)
    assert (died.state, decision) == (SupervisorState.RECOVERING, Restart(after_s=1.0))
    assert (
        died.reason == "the engine died (killed) while a second instance is starting, which takes over; requests wait"
    )
    assert step(died, Succeeded(epoch=1), now_s=2.0, policy=POLICY)[0].state is SupervisorState.READY
    lost, decision = step(died, SuccessorLost(reason="no memory"), now_s=2.0, policy=POLICY)
    assert (lost.state, lost.deaths_total, decision) == (SupervisorState.RECOVERING, 1, None)
    assert lost.reason == (
        "the second instance does not take over (no memory); the engine is started again; requests wait"
    )


@pytest.mark.parametrize(
    ("generated", "finish"),
    [
        pytest.param([], None, id="nothing yet"),
        pytest.param([9] * 39, None, id="one to go"),
        pytest.param([9] * 40, FinishReason.LENGTH, id="all of them"),
        pytest.param([9, 77], FinishReason.STOP, id="a stop token"),
        pytest.param([9, 0], None, id="an end token that is ignored"),
    ],
)
def test_how_a_request_ended_before_the_engine_could_say(generated: list[int], finish: FinishReason | None) -> None:
    request = replace(REQUEST, sampling=replace(REQUEST.sampling, stop_token_ids=(77,)))
    assert finish_of(request, generated, FAKE_CAPABILITIES) is finish


# The runner.


async def test_it_is_ready_after_start(supervisor: Supervisor, workshop: Workshop) -> None:
    assert supervisor.supervision.state is SupervisorState.READY
    assert supervisor.capabilities == FAKE_CAPABILITIES
    assert supervisor.pipeline == ONE
    assert [change.state for change in workshop.changes] == [SupervisorState.READY]


async def test_a_first_start_that_fails_is_the_callers_business(workshop: Workshop) -> None:
    workshop.start_failures = ["no such model"]
    supervisor = Supervisor(factory=workshop.make, pipeline=ONE)
    with pytest.raises(EngineStartFailed, match="no such model"):
        await supervisor.start()
    await supervisor.close()


async def test_a_stream_goes_on_token_exactly(supervisor: Supervisor, workshop: Workshop) -> None:
    def kill_at_10_and_25(count: int) -> None:
        if count in (10, 25):
            workshop.engines[-1].kill("killed")

    assert await collect(supervisor, kill_at_10_and_25) == await undisturbed()
    assert len(workshop.engines) == 3
    assert [change.state.value for change in workshop.changes] == ["ready", *["recovering", "ready"] * 2]


async def test_a_death_after_the_last_token_ends_with_its_reason(supervisor: Supervisor) -> None:
    """The engine died between its last token and the word that it was the last."""
    whole = await undisturbed()
    resumed = replace(REQUEST, generated_token_ids=whole)
    chunks = [chunk async for chunk in supervisor.generate(resumed)]
    assert [(chunk.token_ids, chunk.finish_reason) for chunk in chunks] == [((), FinishReason.LENGTH)]


async def test_requests_wait_while_the_engine_recovers(supervisor: Supervisor, workshop: Workshop) -> None:
    workshop.start_failures = [None]
    workshop.engines[0].kill("gone")
    assert await tokens_of(supervisor) == await undisturbed()
    assert supervisor.supervision.deaths_total == 1


async def test_the_layout_in_force_survives_a_death(supervisor: Supervisor, workshop: Workshop) -> None:
    assert supervisor.engine is not None
    async for _report in supervisor.engine.refactor(TWO):
        pass
    workshop.engines[0].kill("gone")
    engine = await supervisor.ready_engine(other_than=workshop.engines[0])
    assert engine.pipeline == TWO == supervisor.pipeline
    assert workshop.pipelines == [ONE, TWO]


async def test_starts_that_fail_are_tried_again_later(supervisor: Supervisor, workshop: Workshop) -> None:
    workshop.start_failures = ["port in use", None]
    workshop.engines[0].kill("gone")
    await until(lambda: len(workshop.engines) == 3)
    assert workshop.slept_s[:2] == [1.0, 2.0]
    await supervisor.ready_engine()


async def test_it_gives_up_and_says_why(supervisor: Supervisor, workshop: Workshop) -> None:
    workshop.start_failures = ["no memory"] * 5
    waiting = asyncio.create_task(tokens_of(supervisor))
    workshop.engines[0].kill("gone")
    with pytest.raises(EngineDied, match="died 3 times within 60 s, at last: no memory"):
        await waiting
    assert supervisor.supervision.state is SupervisorState.FAILED
    with pytest.raises(EngineDied):
        await tokens_of(supervisor)


async def test_deaths_far_apart_are_forgiven(supervisor: Supervisor, workshop: Workshop) -> None:
    for _ in range(6):
        await supervisor.ready_engine()
        workshop.now_s += 100.0
        dead = workshop.engines[-1]
        dead.kill("gone")
        await supervisor.ready_engine(other_than=dead)
    assert supervisor.supervision.state is SupervisorState.READY


async def test_a_request_that_kills_every_engine_is_not_run_for_ever(workshop: Workshop) -> None:
    def die(_request: GenerationRequest, _position: int) -> int:
        workshop.engines[-1].kill("illegal instruction")
        return 1

    workshop.next_token = die
    supervisor = Supervisor(factory=workshop.make, pipeline=ONE, sleep=workshop.sleep)
    await supervisor.start()
    with pytest.raises(EngineDied, match="died 3 times in a row over this request"):
        await tokens_of(supervisor)
    await supervisor.close()


async def test_an_invalid_request_is_passed_on(supervisor: Supervisor) -> None:
    with pytest.raises(InvalidRequest):
        await tokens_of(supervisor, replace(REQUEST, prompt_token_ids=()))


async def test_closing_a_stream_frees_it_in_any_state(supervisor: Supervisor, workshop: Workshop) -> None:
    async with closing(supervisor.generate(REQUEST)) as chunks:
        await anext(chunks)
    counters = await workshop.engines[0].counters()
    assert (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)


async def test_close_ends_waiting_and_running_requests(supervisor: Supervisor, workshop: Workshop) -> None:
    workshop.engines[0].hold()
    running = asyncio.create_task(tokens_of(supervisor))
    await asyncio.sleep(0)
    await supervisor.close()
    await supervisor.close()
    with pytest.raises(EngineClosed):
        await running
    with pytest.raises(EngineClosed):
        await supervisor.ready_engine()
