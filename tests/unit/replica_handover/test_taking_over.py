"""A second instance takes over while requests run: nothing is lost, repeated or altered."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from engines.closing import closing
from engines.errors import RefactoringAborted
from engines.protocol import RefactorProgress
from engines.restarts import RestartPolicy
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervisor import Supervisor
from planner.handover import HandoverPhase
from tests.support.layouts import even_pipeline
from tests.support.until import until
from tests.unit.replica_handover.stand import (
    FOUR,
    LIMITS,
    TOKENS,
    TWO,
    Streams,
    Workshop,
    assert_idle,
    background,
    request,
    take_over,
    undisturbed,
)


async def test_32_streams_lose_repeat_and_alter_nothing(
    supervisor: Supervisor, streams: Streams, workshop: Workshop
) -> None:
    streams.begin()
    await streams.reach(10)
    reports = await take_over(supervisor)
    first, second = workshop.engines
    assert first.is_closed
    assert (supervisor.engine, supervisor.pipeline, supervisor.epoch) == (second, FOUR, 1)
    await streams.assert_exact()
    assert (reports[-1].phase, reports[-1].epoch) == (HandoverPhase.DONE, 1)
    assert reports[-1].message == "the second instance serves, 32 of 32 requests taken over: 32 computed again"
    assert reports[-1].requests_live == 32
    await assert_idle(second, supervisor)
    assert supervisor.supervision.reason == "the second instance serves, epoch 1"
    assert supervisor.supervision.deaths_total == 0


async def test_each_phase_is_reported_in_order(supervisor: Supervisor, streams: Streams) -> None:
    streams.begin(3)
    await streams.reach(5)
    said = [(report.phase.value, report.message) for report in await take_over(supervisor)]
    assert said == [
        ("prepare", "second instance: starting"),
        ("prepare", "second instance: waiting for the gate"),
        ("prepare", "second instance: starting the fake engine"),
        ("prepare", "second instance: ready"),
        ("sync", "switching over"),
        ("sync", "0 of 3 requests taken over"),
        ("sync", "1 of 3 requests taken over"),
        ("sync", "2 of 3 requests taken over"),
        ("commit", "3 of 3 requests taken over: 3 computed again"),
        ("retire", "the second instance serves, the first one ends"),
        ("done", "the second instance serves, 3 of 3 requests taken over: 3 computed again"),
    ]
    await streams.assert_exact()


async def test_new_requests_go_to_the_first_until_the_switch(
    supervisor: Supervisor, streams: Streams, workshop: Workshop
) -> None:
    workshop.may_start.clear()
    handing_over = background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    await until(lambda: len(workshop.engines) == 2)
    streams.begin(4)
    await streams.reach(5)
    assert (await workshop.engines[0].counters()).running == 4
    workshop.may_start.set()
    await handing_over
    streams.begin(4)
    await streams.assert_exact()
    assert (await workshop.engines[1].counters()).generated_tokens_total > 4 * TOKENS


async def test_requests_that_wait_in_the_first_engine_go_over_too(workshop: Workshop) -> None:
    workshop.max_running = 4
    supervisor = Supervisor(factory=workshop.make, pipeline=TWO, sleep=workshop.sleep)
    await supervisor.start()
    streams = Streams(supervisor)
    streams.begin(12)
    await until(lambda: len(streams.got[0]) > 5)
    assert (await workshop.engines[0].counters()).waiting == 8
    workshop.engines[0].hold()  # else some end there while others wait, in real time, for a place at the second
    runner = ReplicaRunner(supervisor, FOUR, limits=replace(LIMITS, pace_s=0.001))
    last = [report async for report in runner.run()][-1]
    assert last.message == "the second instance serves, 12 of 12 requests taken over: 12 computed again"
    await streams.assert_exact()
    await supervisor.close()


async def test_a_reader_that_is_busy_elsewhere_holds_nothing_up(supervisor: Supervisor, workshop: Workshop) -> None:
    chunks = supervisor.generate(request(1))
    assert isinstance(chunks, AsyncIterator)
    got = [token for _ in range(5) for token in (await anext(chunks)).token_ids]
    await take_over(supervisor)
    assert workshop.engines[0].is_closed
    got += [token async for chunk in chunks for token in chunk.token_ids]
    assert got == undisturbed(1)


async def test_it_is_tried_out_before_it_takes_over(
    supervisor: Supervisor, streams: Streams, workshop: Workshop
) -> None:
    workshop.may_start.clear()
    streams.begin(1)
    await streams.reach(5)
    handing_over = background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    await until(lambda: len(workshop.engines) == 2)
    first, second = workshop.engines
    second.hold()
    workshop.may_start.set()
    await until(lambda: second.is_trying)
    assert supervisor.engine is first
    second.kill("it cannot compute")
    with pytest.raises(RefactoringAborted, match="given up: it cannot compute; the first instance serves on"):
        await handing_over
    assert supervisor.engine is first
    await streams.assert_exact()


async def test_hang_ups_during_the_take_over_leave_nothing_behind(
    supervisor: Supervisor, streams: Streams, workshop: Workshop
) -> None:
    streams.begin()
    await streams.reach(5)
    async for report in ReplicaRunner(supervisor, FOUR, limits=LIMITS).run():
        if report.phase is HandoverPhase.SYNCING and report.message != "switching over":
            taken = int(report.message.split()[0])
            for task in streams.tasks[taken : taken + 2] + streams.tasks[-1:]:
                task.cancel()  # the one whose turn it is, and others
            streams.tasks.pop()
    await asyncio.gather(*streams.tasks, return_exceptions=True)
    await until(lambda: len(supervisor.flights) == 0)
    assert workshop.engines[0].is_closed
    await assert_idle(workshop.engines[1], supervisor)
    with capture_logs():
        assert len(await take_over(supervisor, TWO)) > 0


async def test_hang_ups_at_any_turn_leave_nothing_behind(workshop: Workshop) -> None:
    """The same with one hang-up, at each turn of the loop that a handover takes."""
    is_over = False
    for turns in range(60):
        supervisor = Supervisor(factory=workshop.make, pipeline=TWO, sleep=workshop.sleep)
        await supervisor.start()
        streams = Streams(supervisor)
        streams.begin(2)
        await streams.reach(3)
        handing_over = background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
        for _ in range(turns):
            await asyncio.sleep(0)
        is_over = handing_over.done()
        streams.tasks[0].cancel()
        await handing_over
        await streams.tasks[1]
        assert streams.got[1] == undisturbed(1)
        await asyncio.wait(streams.tasks)
        await assert_idle(workshop.engines[-1], supervisor)
        await supervisor.close()
    assert is_over, "more turns are needed to come to the end of a handover"


@pytest.mark.parametrize("seed", range(8))
async def test_readers_at_any_pace_with_deaths_and_handovers_at_any_time(workshop: Workshop, seed: int) -> None:
    rng = random.Random(seed)
    supervisor = Supervisor(
        factory=workshop.make, pipeline=TWO, policy=RestartPolicy(max_deaths=99), sleep=workshop.sleep
    )
    await supervisor.start()
    got: list[list[int]] = [[] for _ in range(12)]

    async def read(index: int) -> None:
        """Read at a pace of its own; every third leaves early."""
        async with closing(supervisor.generate(request(index))) as chunks:
            async for chunk in chunks:
                got[index].extend(chunk.token_ids)
                if index % 3 == 0 and len(got[index]) > 40 * index:
                    return
                for _ in range(rng.randrange(index + 1)):
                    await asyncio.sleep(0)

    reading = asyncio.gather(*(read(index) for index in range(len(got))))
    while not reading.done():
        handing_over = background(
            ReplicaRunner(supervisor, even_pipeline(rng.randint(1, 8)), limits=replace(LIMITS, pace_s=0.001))
        )
        while not handing_over.done():
            await asyncio.sleep(0)
            if rng.random() < 0.02:
                rng.choice(workshop.engines[-2:]).kill("bad luck")
        await asyncio.gather(handing_over, return_exceptions=True)
        await supervisor.ready_engine()
    await reading
    for index, tokens in enumerate(got):
        assert tokens == undisturbed(index)[: len(tokens)]
        assert len(tokens) == TOKENS or index % 3 == 0
    await assert_idle(workshop.engines[-1], supervisor)
    await supervisor.close()
    assert all(engine.is_closed for engine in workshop.engines)


async def test_back_to_back(supervisor: Supervisor, streams: Streams, workshop: Workshop) -> None:
    streams.begin()
    await streams.reach(5)
    for number, stages in enumerate((4, 1, 8, 2, 4), start=1):
        await take_over(supervisor, even_pipeline(stages))
        assert (supervisor.pipeline.granularity, supervisor.epoch) == (stages, number)
    await streams.assert_exact()
    assert [engine.is_closed for engine in workshop.engines] == [True] * 5 + [False]
    await assert_idle(workshop.engines[-1], supervisor)


async def test_a_request_that_ends_before_its_turn_is_not_counted(supervisor: Supervisor, streams: Streams) -> None:
    streams.begin(4)
    await streams.reach(5)
    last: RefactorProgress | None = None
    async for last in ReplicaRunner(supervisor, FOUR, limits=LIMITS).run():
        if last.message == "0 of 4 requests taken over":
            streams.tasks[3].cancel()
    assert last is not None
    assert last.message == "the second instance serves, 3 of 3 requests taken over: 3 computed again"
    await asyncio.wait(streams.tasks)


async def test_the_route_of_each_request_is_logged(supervisor: Supervisor, streams: Streams) -> None:
    streams.begin(2)
    await streams.reach(5)
    with capture_logs() as logs:
        await take_over(supervisor)
    assert [(log["event"], log["log_level"], log["request"], log["route"]) for log in logs] == [
        ("request taken over", "debug", "r0", "recompute"),
        ("request taken over", "debug", "r1", "recompute"),
    ]
    assert logs[0]["reason"] == "the fake engine does not hand its KV cache over"
    await streams.assert_exact()
