"""Several replicas with the fake engine: requests are routed, replicas come and go, and no token is lost."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from engines.closing import closing
from engines.errors import EngineClosed, EngineDied, EngineError, EngineStartFailed
from engines.fake import FAKE_CAPABILITIES, FakeEngine
from engines.protocol import GenerationRequest
from engines.restarts import RestartPolicy
from flexpiped.flight import Flights
from flexpiped.replica import Replica, ReplicaState
from flexpiped.replica_facts import ReplicaFacts
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.replicas import Replicas
from flexpiped.supervision import Supervision, SupervisorState
from flexpiped.supervisor import EngineFactory, Supervisor
from planner.layout import Pipeline
from tests.support.until import until
from tests.unit.test_supervisor import ONE, REQUEST, TWO, Workshop, undisturbed

GIVEN_UP_AT_ONCE = RestartPolicy(max_deaths=1, window_s=60.0, first_delay_s=1.0, max_delay_s=8.0)
CACHING = replace(FAKE_CAPABILITIES, caches_prefixes=True)


class Stand:
    """Replicas of fake engines; ``first`` and ``second`` are those of one and of two stages."""

    def __init__(self) -> None:
        self.workshop = Workshop()
        self.policy = RestartPolicy(max_deaths=3, window_s=60.0, first_delay_s=1.0, max_delay_s=8.0)
        self.changes: list[tuple[int, SupervisorState]] = []
        self.replicas = Replicas(
            make=self.make,
            facts=ReplicaFacts,
            on_change=lambda number, supervision: self.changes.append((number, supervision.state)),
        )

    def make(
        self,
        *,
        factory: EngineFactory,
        pipeline: Pipeline,
        flights: Flights,
        on_change: Callable[[Supervision], None],
        on_progress: Callable[[str], None],
    ) -> Supervisor:
        return Supervisor(
            factory=factory,
            pipeline=pipeline,
            policy=self.policy,
            sleep=self.workshop.sleep,
            on_change=on_change,
            on_progress=on_progress,
            flights=flights,
        )

    async def add(self, pipeline: Pipeline) -> Replica:
        return await self.replicas.add(pipeline, factory=self.workshop.make)

    def engine(self, index: int) -> FakeEngine:
        return self.workshop.engines[index]

    async def tokens(
        self, request: GenerationRequest = REQUEST, *, then: Callable[[int], None] = lambda _n: None
    ) -> tuple[int, ...]:
        found: list[int] = []
        async with closing(self.replicas.generate(request)) as chunks:
            async for chunk in chunks:
                found.extend(chunk.token_ids)
                then(len(found))
        return tuple(found)


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    stand = Stand()
    await stand.add(ONE)
    yield stand
    await stand.replicas.close()


async def begun(stand: Stand, count: int) -> "list[asyncio.Task[tuple[int, ...]]]":
    """Start requests that each have their first token."""
    counts = [0] * count

    def told(index: int) -> Callable[[int], None]:
        return lambda n: counts.__setitem__(index, n)

    tasks = []
    for index in range(count):
        tasks.append(asyncio.create_task(stand.tokens(replace(REQUEST, request_id=f"r{index}"), then=told(index))))
        await until(lambda: counts[index] > 0)  # noqa: B023  it is called before the next
    return tasks


async def test_replicas_of_different_granularity_serve_at_the_same_time(stand: Stand) -> None:
    second = await stand.add(TWO)
    assert [each.number for each in stand.replicas.all] == [1, 2]
    assert (second.state, second.supervisor.pipeline) == (ReplicaState.SERVING, TWO)
    assert stand.replicas.device_ids() == {"cpu:0", "cpu:1"}
    assert stand.replicas.device_ids(but=second) == {"cpu:0"}
    streams = await begun(stand, 4)
    at = [len(stand.replicas.flights.at(stand.engine(index))) for index in (0, 1)]
    assert at == [2, 2]
    assert set(await asyncio.gather(*streams)) == {await undisturbed()}


async def test_a_killed_replica_loses_nothing_its_requests_go_on_at_the_other(stand: Stand) -> None:
    await stand.add(TWO)
    streams = await begun(stand, 4)
    stand.engine(1).kill("killed by a test")
    await until(lambda: len(stand.replicas.flights.at(stand.engine(0))) == 4)
    assert set(await asyncio.gather(*streams)) == {await undisturbed()}
    await until(lambda: stand.replicas.all[1].engine is not None)  # it is started again meanwhile
    assert len(stand.workshop.engines) == 3


async def test_a_replica_that_leaves_drains_first(stand: Stand) -> None:
    second = await stand.add(TWO)
    streams = await begun(stand, 2)
    removing = asyncio.create_task(stand.replicas.remove(second, drain_deadline_s=30.0))
    await until(lambda: second.state is ReplicaState.DRAINING)
    await begun(stand, 1)
    assert len(stand.replicas.flights.at(stand.engine(1))) <= 1
    assert await removing == 0
    assert stand.replicas.all == (stand.replicas.main,)
    assert set(await asyncio.gather(*streams)) == {await undisturbed()}


async def test_what_is_late_at_a_replica_that_leaves_goes_on_at_another(stand: Stand) -> None:
    second = await stand.add(TWO)
    streams = await begun(stand, 2)
    stand.engine(1).hold()
    assert await stand.replicas.remove(second, drain_deadline_s=0.01) == 1
    assert set(await asyncio.gather(*streams)) == {await undisturbed()}
    assert second not in stand.replicas.all


async def test_the_only_replica_that_serves_stays(stand: Stand) -> None:
    with pytest.raises(EngineError, match="replica 1 is the only one that serves"):
        await stand.replicas.remove(stand.replicas.main, drain_deadline_s=1.0)
    second = await stand.add(TWO)
    await stand.replicas.remove(stand.replicas.main, drain_deadline_s=1.0)
    assert (stand.replicas.main, stand.replicas.pipeline) == (second, TWO)
    assert await stand.tokens() == await undisturbed()


async def test_a_replica_that_does_not_start_leaves_nothing_behind(stand: Stand) -> None:
    stand.workshop.start_failures = ["no room"]
    with pytest.raises(EngineStartFailed, match="no room"):
        await stand.add(TWO)
    assert [each.number for each in stand.replicas.all] == [1]
    assert await stand.tokens() == await undisturbed()


async def test_a_replica_that_has_failed_for_good_leaves_and_the_service_goes_on(stand: Stand) -> None:
    stand.policy = GIVEN_UP_AT_ONCE
    await stand.add(TWO)
    streams = await begun(stand, 2)
    stand.engine(1).kill("no device")
    await until(lambda: len(stand.replicas.all) == 1)
    assert stand.replicas.supervision.state is SupervisorState.READY
    assert (2, SupervisorState.FAILED) in stand.changes
    assert set(await asyncio.gather(*streams)) == {await undisturbed()}


async def test_requests_fail_only_when_all_replicas_have(stand: Stand) -> None:
    await stand.replicas.close()
    stand.policy = GIVEN_UP_AT_ONCE
    stand.replicas = Replicas(make=stand.make)
    await stand.add(ONE)
    stand.engine(-1).kill("no device")
    with pytest.raises(EngineDied, match="no device"):
        await stand.tokens()


async def test_a_request_that_waits_for_one_replica_takes_another_that_comes(stand: Stand) -> None:
    stand.engine(0).kill("killed by a test")
    stand.workshop.start_failures = ["not yet"] * 1
    waiting = asyncio.create_task(stand.tokens())
    await stand.replicas.ready_engine(other_than=stand.engine(0))
    assert await waiting == await undisturbed()


async def test_a_handover_of_one_replica_keeps_its_requests_there(stand: Stand) -> None:
    second = await stand.add(TWO)
    streams = await begun(stand, 4)
    last = [report async for report in ReplicaRunner(second.supervisor, ONE).run()][-1]
    assert "2 of 2 requests taken over" in last.message
    assert second.supervisor.pipeline == ONE
    assert set(await asyncio.gather(*streams)) == {await undisturbed()}


async def test_a_prompt_goes_where_its_first_tokens_are(stand: Stand) -> None:
    workshop, prompt = stand.workshop, tuple(range(1, 161))

    def make(pipeline: Pipeline, epoch: int) -> FakeEngine:
        workshop.engines.append(FakeEngine(pipeline=pipeline, epoch=epoch, capabilities=CACHING))
        return workshop.engines[-1]

    caching = [await stand.replicas.add(pipeline, factory=make) for pipeline in (ONE, TWO)]
    await stand.replicas.remove(stand.replicas.main, drain_deadline_s=1.0)
    for each in caching:
        assert each.engine is not None
        each.facts.refresh(each.engine)
    await until(lambda: all(each.facts.kv_capacity_tokens for each in caching))
    asked = replace(REQUEST, prompt_token_ids=prompt)
    caching[1].facts.boards(asked)
    assert (caching[0].facts.cached_tokens(prompt), caching[1].facts.cached_tokens(prompt)) == (0, 160)
    async with closing(stand.replicas.generate(asked)) as chunks:
        await anext(chunks)
        [flight] = stand.replicas.flights.at(workshop.engines[2])
        assert (flight.prefill_tokens, flight.output_tokens) == (0, 39)


async def test_the_only_replica_sleeps_and_one_of_several_does_not(stand: Stand) -> None:
    second = await stand.add(TWO)
    assert not stand.replicas.sleep("nobody")
    await stand.replicas.remove(second, drain_deadline_s=1.0)
    assert stand.replicas.sleep("nobody")
    assert (stand.replicas.is_asleep, stand.replicas.engine) == (True, None)
    assert await stand.tokens() == await undisturbed()


async def test_close_ends_what_runs(stand: Stand) -> None:
    await stand.add(TWO)
    streams = await begun(stand, 2)
    for engine in stand.workshop.engines:
        engine.hold()
    await stand.replicas.close()
    ends = await asyncio.gather(*streams, return_exceptions=True)
    assert [type(end) for end in ends] == [EngineClosed, EngineClosed]
    with pytest.raises(EngineClosed):
        await stand.replicas.ready_engine()
