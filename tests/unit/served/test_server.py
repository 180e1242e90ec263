"""The processes of one engine: whose end is reported."""

import asyncio
import sys
from collections.abc import Iterator
from subprocess import Popen

import pytest

from engines.served.server import EngineServer
from engines.vllm.logs import DIALECT

SLEEPS = (sys.executable, "-S", "-c", "import time; time.sleep(3600)")


@pytest.fixture
def sleepers() -> Iterator[tuple[Popen[bytes], Popen[bytes]]]:
    with Popen(SLEEPS) as core, Popen(SLEEPS) as worker:
        yield core, worker


@pytest.mark.real_loop
async def test_of_several_that_have_ended_the_one_that_took_the_others_along_is_named(
    sleepers: tuple[Popen[bytes], Popen[bytes]],
) -> None:
    core, worker = sleepers
    told: asyncio.Queue[str] = asyncio.Queue()
    server = EngineServer(name="vLLM", dialect=DIALECT, on_log=lambda _line: None, on_death=told.put_nowait)
    await server.spawn(sys.executable, list(SLEEPS), {})
    try:
        server.watch([(core.pid, "the core"), (worker.pid, "the worker")])
        await asyncio.sleep(0)  # the watchers begin
        for process in (worker, core):  # as the loop hears of it
            process.kill()
            process.wait()
        assert await told.get() == f"the core (pid {core.pid}) has ended"
    finally:
        await server.close()
