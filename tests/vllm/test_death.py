"""The death of vLLM's processes as the adapter sees it. See ``test_recovery.py`` for what becomes of streams."""

import os
import signal
import time

import pytest

from engines.errors import EngineDied
from engines.vllm.adapter import VllmEngine
from tests.contract.contract_requests import request_of
from tests.vllm.remains import processes_of, runs, shared_memory

pytestmark = [
    pytest.mark.engine,
    pytest.mark.vllm,
    pytest.mark.real_loop,
    pytest.mark.asyncio(loop_scope="session"),
]

NOTICED_S = 10.0  # a death is noticed at once; a hang would take a minute


@pytest.fixture
def doomed(engine: VllmEngine) -> VllmEngine:
    """The engine of all: a start takes a minute, and the test that kills it is the last."""
    return engine


async def test_the_death_of_a_worker_is_noticed_and_nothing_is_left(doomed: VllmEngine) -> None:
    directory, pids = doomed.run_directory, processes_of(doomed)
    shared = shared_memory(directory)
    assert shared
    assert all(path.exists() for path in shared)
    stream = doomed.generate(request_of(max_tokens=500))
    await anext(stream)
    started_s = time.monotonic()
    os.kill(doomed.pids["workers"][1], signal.SIGKILL)
    reason = await doomed.died()
    assert time.monotonic() - started_s < NOTICED_S
    assert "worker of rank 1" in reason
    with pytest.raises(EngineDied):
        [chunk async for chunk in stream]
    await doomed.close()
    assert [pid for pid in pids if runs(pid)] == []
    assert [path for path in shared if path.exists()] == []
    assert not directory.exists()
