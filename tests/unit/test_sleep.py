"""The supervised engine ends while nobody uses it, and the next request starts it and waits."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from engines.errors import EngineClosed, EngineDied
from engines.fake import FakeEngine
from engines.restarts import RestartPolicy
from flexpiped.supervision import SupervisorState
from flexpiped.supervisor import Supervisor
from planner.layout import Pipeline
from tests.support.until import until
from tests.unit.test_supervisor import ONE, REQUEST, Workshop, tokens_of, undisturbed

POLICY = RestartPolicy(max_deaths=3, window_s=60.0, first_delay_s=1.0, max_delay_s=8.0)


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture
async def supervisor(workshop: Workshop) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(
        factory=workshop.make, pipeline=ONE, policy=POLICY, sleep=workshop.sleep, on_change=workshop.changes.append
    )
    await supervisor.start()
    yield supervisor
    await supervisor.close()


async def test_the_first_request_wakes_it_and_waits(supervisor: Supervisor, workshop: Workshop) -> None:
    assert supervisor.sleep("no request for 300 s")
    assert (supervisor.is_asleep, supervisor.engine) == (True, None)
    assert supervisor.supervision.reason == "asleep, until a request comes: no request for 300 s"
    assert await tokens_of(supervisor) == await undisturbed()
    assert [change.state for change in workshop.changes[1:]] == [
        SupervisorState.ASLEEP,
        SupervisorState.STARTING,
        SupervisorState.READY,
    ]
    assert workshop.pipelines == [ONE, ONE]


async def test_requests_that_come_while_it_falls_asleep_wait_for_the_end_of_the_first_engine(
    supervisor: Supervisor,
) -> None:
    supervisor.sleep("nobody")
    all_tokens = await asyncio.gather(*(tokens_of(supervisor) for _ in range(3)))
    assert set(all_tokens) == {await undisturbed()}
    assert not supervisor.is_asleep


async def test_it_does_not_sleep_while_a_request_is_under_way(supervisor: Supervisor) -> None:
    chunks = supervisor.generate(REQUEST)
    await anext(chunks)
    assert not supervisor.sleep("nobody")
    await chunks.aclose()  # type: ignore[attr-defined]
    assert supervisor.sleep("nobody")
    assert not supervisor.sleep("nobody")


async def test_it_wakes_also_where_the_first_start_fails(supervisor: Supervisor, workshop: Workshop) -> None:
    workshop.start_failures = ["no memory"]
    supervisor.sleep("nobody")
    assert await tokens_of(supervisor) == await undisturbed()
    assert len(workshop.engines) == 3


async def test_it_sleeps_again_and_a_death_after_waking_is_recovered_from(
    supervisor: Supervisor, workshop: Workshop
) -> None:
    for _ in range(3):
        assert supervisor.sleep("nobody")
        assert await tokens_of(supervisor) == await undisturbed()
    workshop.engines[-1].kill("killed by a test")
    assert await tokens_of(supervisor) == await undisturbed()


async def test_closing_while_it_sleeps_ends_those_who_would_wake_it(workshop: Workshop) -> None:
    supervisor = Supervisor(factory=workshop.make, pipeline=ONE, policy=POLICY, sleep=workshop.sleep)
    await supervisor.start()
    supervisor.sleep("nobody")
    await supervisor.close()
    with pytest.raises(EngineClosed):
        await tokens_of(supervisor)


async def test_a_request_waits_no_longer_than_it_may() -> None:
    may_start = asyncio.Event()
    may_start.set()

    class Gated(FakeEngine):
        async def start(self, *, on_progress: Callable[[str], None]) -> None:
            await may_start.wait()
            await super().start(on_progress=on_progress)

    def make(pipeline: Pipeline, epoch: int) -> FakeEngine:
        return Gated(pipeline=pipeline, epoch=epoch)

    supervisor = Supervisor(factory=make, pipeline=ONE, policy=POLICY, wait_deadline_s=0.2)
    await supervisor.start()
    may_start.clear()
    supervisor.sleep("nobody")
    with pytest.raises(EngineDied, match=r"no engine has served within 0\.2 s: the engine is waking up"):
        await tokens_of(supervisor)
    may_start.set()
    await until(lambda: supervisor.engine is not None)
    assert await tokens_of(supervisor) == await undisturbed()
    await supervisor.close()
