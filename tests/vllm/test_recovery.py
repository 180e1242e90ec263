"""Streams go on token-exactly when vLLM is replaced: by a second instance, and after a death. Greedy, in fp32."""

import asyncio
import os
import signal

import pytest

from engines.closing import closing
from engines.vllm.adapter import VllmEngine
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervisor import Supervisor
from planner.handover import HandoverPhase
from planner.layout import Pipeline
from tests.support.vllm import graph_of, layout, llama, options_for
from tests.vllm.streams import Result, run_streams, stream

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop]

STREAMS = 32
TOKENS = 120


class Made:
    """Makes engines with as many ranks as the pipeline has stages, and remembers them."""

    def __init__(self) -> None:
        self.engines: list[VllmEngine] = []

    def __call__(self, pipeline: Pipeline, epoch: int) -> VllmEngine:
        options = options_for(llama(), ranks=pipeline.granularity)
        self.engines.append(VllmEngine(options, pipeline, epoch=epoch, graph=graph_of(llama())))
        return self.engines[-1]


async def through(supervisor: Supervisor, index: int, begun: asyncio.Event) -> list[int]:
    tokens: list[int] = []
    async with closing(supervisor.generate(stream(index, max_tokens=TOKENS))) as chunks:
        async for chunk in chunks:
            tokens += chunk.token_ids
            begun.set()
    return tokens


async def begin(supervisor: Supervisor) -> list["asyncio.Task[list[int]]"]:
    """Start all streams and return when each has a token."""
    begun = [asyncio.Event() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(through(supervisor, index, begun[index])) for index in range(STREAMS)]
    await asyncio.gather(*(event.wait() for event in begun))
    return tasks


async def assert_unchanged(tasks: list["asyncio.Task[list[int]]"], expected: Result) -> None:
    assert await asyncio.gather(*tasks) == [tokens for tokens, _ in expected]


async def test_32_streams_survive_a_replica_handover_and_a_killed_core() -> None:
    made = Made()
    supervisor = Supervisor(factory=made, pipeline=layout(4))
    await supervisor.start()
    try:
        expected = await run_streams(made.engines[0], count=STREAMS, max_tokens=TOKENS)

        streams = await begin(supervisor)
        last = [report async for report in ReplicaRunner(supervisor, layout(3, 6)).run()][-1]
        assert (last.phase, supervisor.pipeline, len(made.engines)) == (HandoverPhase.DONE, layout(3, 6), 2)
        await assert_unchanged(streams, expected)

        streams = await begin(supervisor)
        os.kill(made.engines[1].pids["core"], signal.SIGKILL)
        await assert_unchanged(streams, expected)
        assert supervisor.engine is made.engines[2]
        assert supervisor.pipeline == layout(3, 6)
    finally:
        await supervisor.close()
