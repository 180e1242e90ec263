"""Streams go on token-exactly after the death of any of SGLang's processes. Greedy, in fp32."""

import asyncio
import os
import signal

import pytest

from engines.sglang.adapter import SglangEngine
from flexpiped.supervisor import Supervisor
from planner.layout import Pipeline
from tests.support.sglang import options_for
from tests.support.vllm import graph_of, layout, llama
from tests.vllm.streams import STREAMS, run_streams, stream

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop]

TOKENS = 150


class Made:
    """Makes engines and remembers them."""

    def __init__(self) -> None:
        self.engines: list[SglangEngine] = []

    def __call__(self, pipeline: Pipeline, epoch: int) -> SglangEngine:
        options = options_for(llama(), ranks=pipeline.granularity)
        self.engines.append(SglangEngine(options, pipeline, epoch=epoch, graph=graph_of(llama())))
        return self.engines[-1]


def pid_of(engine: SglangEngine, victim: str) -> int:
    pids = engine.pids
    of_one: dict[str, int] = {
        "the API server": pids["api"],
        "the first scheduler": pids["workers"][0],
        "the last scheduler": pids["workers"][-1],
        "the detokenizer": pids["detokenizers"][0],
    }
    return of_one[victim]


async def survive(*victims: str) -> None:
    made = Made()
    supervisor = Supervisor(factory=made, pipeline=layout(4))
    await supervisor.start()
    try:
        undisturbed = [tokens for tokens, _ in await run_streams(made.engines[0], max_tokens=TOKENS)]
        for victim in victims:
            begun = [asyncio.Event() for _ in range(STREAMS)]

            async def read(index: int, begun: list[asyncio.Event] = begun) -> list[int]:
                tokens: list[int] = []
                async for chunk in supervisor.generate(stream(index, max_tokens=TOKENS)):
                    tokens += chunk.token_ids
                    begun[index].set()
                return tokens

            reading = [asyncio.create_task(read(index)) for index in range(STREAMS)]
            await asyncio.gather(*(event.wait() for event in begun))
            count = len(made.engines)
            os.kill(pid_of(made.engines[-1], victim), signal.SIGKILL)
            assert await asyncio.gather(*reading) == undisturbed, victim
            assert len(made.engines) == count + 1, victim
    finally:
        await supervisor.close()


async def test_streams_survive_the_death_of_a_scheduler() -> None:
    await survive("the last scheduler")


@pytest.mark.long
async def test_streams_survive_the_death_of_any_other_process() -> None:
    await survive("the API server", "the first scheduler", "the detokenizer")
