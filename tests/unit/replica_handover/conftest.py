"""A supervised engine of two stages, with streams."""

from collections.abc import AsyncIterator

import pytest

from engines.restarts import RestartPolicy
from flexpiped.supervisor import Supervisor
from tests.unit.replica_handover.stand import TWO, Streams, Workshop


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture
async def supervisor(workshop: Workshop) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(
        factory=workshop.make, pipeline=TWO, policy=RestartPolicy(max_deaths=5), sleep=workshop.sleep
    )
    await supervisor.start()
    yield supervisor
    await supervisor.close()
    assert all(engine.is_closed for engine in workshop.engines)


@pytest.fixture
def streams(supervisor: Supervisor) -> Streams:
    return Streams(supervisor)
