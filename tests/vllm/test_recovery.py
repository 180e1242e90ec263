"""Streams go on token-exactly when vLLM is replaced: by a second instance, and after a death. Greedy, in fp32."""

import asyncio
import os
import re
import signal
from dataclasses import replace

import pytest

from engines.closing import closing
from engines.protocol import KvParcel
from engines.vllm.adapter import VllmEngine
from flexpiped.kv_carrier import KvCarrier
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervisor import Supervisor
from planner.handover import HandoverPhase
from planner.kv_route import KvPreference
from planner.layout import Pipeline
from tests.support.vllm import graph_of, layout, llama, options_for
from tests.vllm.streams import Result, collect, move, run_streams, stream

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop]

STREAMS = 32
TOKENS, FEWER = 400, 120  # enough that all streams are under way until the last of them has been taken over


class Made:
    """Makes engines with as many ranks as the pipeline has stages, and remembers them."""

    def __init__(self) -> None:
        self.engines: list[VllmEngine] = []

    def __call__(self, pipeline: Pipeline, epoch: int) -> VllmEngine:
        options = options_for(llama(), ranks=pipeline.granularity, kv_cache_bytes=96 << 20)
        self.engines.append(VllmEngine(options, pipeline, epoch=epoch, graph=graph_of(llama())))
        return self.engines[-1]


async def through(supervisor: Supervisor, index: int, begun: asyncio.Event, max_tokens: int) -> list[int]:
    tokens: list[int] = []
    async with closing(supervisor.generate(stream(index, max_tokens=max_tokens))) as chunks:
        async for chunk in chunks:
            tokens += chunk.token_ids
            begun.set()
    return tokens


async def begin(supervisor: Supervisor, max_tokens: int) -> list["asyncio.Task[list[int]]"]:
    """Start all streams and return when each has a token."""
    begun = [asyncio.Event() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(through(supervisor, index, begun[index], max_tokens)) for index in range(STREAMS)]
    await asyncio.gather(*(event.wait() for event in begun))
    return tasks


async def assert_unchanged(tasks: list["asyncio.Task[list[int]]"], expected: Result, max_tokens: int) -> None:
    assert await asyncio.gather(*tasks) == [tokens[:max_tokens] for tokens, _ in expected]


async def copied_by_hand(first: VllmEngine, second: VllmEngine, *, salt: int) -> list[int]:
    """Return the tokens of a stream that leaves one engine for the other with its KV cache, as a handover does it."""
    wanted = replace(stream(3, max_tokens=FEWER, salt=salt), request_id=f"by-hand-{salt}")
    tokens: list[int] = []
    parcel: KvParcel | None = None
    async with closing(first.generate(wanted)) as chunks:
        async for chunk in chunks:
            tokens += chunk.token_ids
            if len(tokens) >= FEWER // 2:
                parcel = await first.export_kv(wanted.request_id)
                break
    assert parcel is not None
    await second.accept_kv(parcel)
    rest, _ = await collect(second, replace(wanted, generated_token_ids=tuple(tokens), kv=parcel))
    await second.forget_kv(parcel)
    await first.forget_kv(parcel)
    assert not await asyncio.to_thread(parcel.directory.exists)
    return tokens + rest


async def assert_control_fails(first: VllmEngine, second: VllmEngine) -> None:
    """With the copy left out the output differs: else the streams that go over would show nothing."""
    for salt, is_exact in ((7, True), (8, False)):
        (expected,) = [tokens for tokens, _ in (await run_streams(first, count=4, max_tokens=FEWER, salt=salt))[3:]]
        if not is_exact:
            for rank in range(3):
                await second.arm_failpoint("worker.kv_in", "skip", rank=rank)
        assert (await copied_by_hand(first, second, salt=salt) == expected) == is_exact
    for rank in range(3):
        await second.arm_failpoint("", "", rank=rank)


async def test_32_streams_survive_a_replica_handover_and_a_killed_core() -> None:
    """Their KV caches are copied, but for one whose copy fails; and layers move in the vLLM that took them in."""
    made = Made()
    supervisor = Supervisor(factory=made, pipeline=layout(4))
    await supervisor.start()
    try:
        expected = await run_streams(made.engines[0], count=STREAMS, max_tokens=TOKENS)
        streams = []
        runner = ReplicaRunner(supervisor, layout(3, 6), carrier=KvCarrier(preference=KvPreference.COPY))
        message = ""
        async for report in runner.run():
            message = report.message
            if message == "second instance: ready":
                await assert_control_fails(made.engines[0], made.engines[1])
                await made.engines[1].arm_failpoint("worker.kv_open", "fail", rank=1)
                streams = await begin(supervisor, TOKENS)
        assert (supervisor.pipeline, len(made.engines)) == (layout(3, 6), 2)
        how = (
            r"the second instance serves, 32 of 32 requests taken over: 31 KV copied \([0-9.]+ MiB\), 1 computed again"
        )
        assert re.fullmatch(how, message), message
        moved = await move(made.engines[1], layout(2, 6))
        assert moved[-1].phase is HandoverPhase.DONE
        await assert_unchanged(streams, expected, TOKENS)

        streams = await begin(supervisor, FEWER)
        os.kill(made.engines[1].pids["core"], signal.SIGKILL)
        await assert_unchanged(streams, expected, FEWER)
        assert supervisor.engine is made.engines[2]
        assert supervisor.pipeline == layout(2, 6)
    finally:
        await supervisor.close()
