"""KV caches go from one real vLLM to another by NIXL, through host memory; what NIXL cannot do is computed again."""

import re

import aiohttp
import pytest

from engines.vllm.adapter import VllmEngine
from flexpiped.kv_carrier import KvCarrier
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervisor import Supervisor
from planner.kv_route import KvPreference
from planner.layout import Pipeline
from planner.replica_steps import ReplicaLimits
from tests.support.nixl import ARGS, TRANSPORTS, nixl_interpreter
from tests.support.vllm import graph_of, layout, options_for, roomy_llama
from tests.vllm.copied import copied_by_hand
from tests.vllm.recovering import Streams
from tests.vllm.streams import collect, run_streams, stream

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop, pytest.mark.long]
STREAMS = 4
PATIENT = ReplicaLimits(pace_s=60.0)
BEFORE = 40  # tokens of each at the first vLLM: more than a KV block
_SOURCES = re.compile(r'^vllm:prompt_tokens_by_source_total\{.*source="(\w+)"\} (\S+)$', re.MULTILINE)


def with_nixl(pipeline: Pipeline, epoch: int) -> VllmEngine:
    options = options_for(
        roomy_llama(),
        ranks=1,
        python=nixl_interpreter(),
        args=ARGS,
        env=TRANSPORTS,
        threads=1,
        kv_cache_bytes=128 << 20,
    )
    return VllmEngine(options, pipeline, epoch=epoch, graph=graph_of(roomy_llama()))


async def prompt_tokens_by_source(engine: VllmEngine) -> dict[str, int]:
    """Return where vLLM has had the tokens of prompts from, in its words."""
    connector = aiohttp.UnixConnector(path=str(engine.own_routes_socket))
    async with (
        aiohttp.ClientSession(connector=connector, base_url="http://vllm") as session,
        session.get("/metrics") as answer,
    ):
        found = _SOURCES.findall(await answer.text())
    return {source: int(float(tokens)) for source, tokens in found}


async def assert_exact_by_hand(first: VllmEngine, second: VllmEngine) -> None:
    tokens = await copied_by_hand(first, second, salt=7)
    undisturbed, _ = await collect(first, stream(3, max_tokens=len(tokens), salt=7))
    assert tokens == undisturbed


async def test_streams_survive_a_handover_with_their_kv_caches_read_by_nixl() -> None:
    made: list[VllmEngine] = []

    def factory(pipeline: Pipeline, epoch: int) -> VllmEngine:
        made.append(with_nixl(pipeline, epoch))
        return made[-1]

    supervisor = Supervisor(factory=factory, pipeline=layout())
    await supervisor.start()
    try:
        streams, message = Streams(supervisor, count=STREAMS), ""
        carrier = KvCarrier(preference=KvPreference.COPY)
        async for report in ReplicaRunner(supervisor, layout(), carrier=carrier, limits=PATIENT).run():
            message = report.message
            if message == "second instance: ready":
                assert made[0].capabilities.kv_form.startswith("by NIXL: ")
                await assert_exact_by_hand(*made)  # NIXL connects them, which takes long where other work runs
                await streams.begin()
                await streams.gain(BEFORE)
        assert f"{STREAMS} of {STREAMS} requests taken over: {STREAMS} KV copied" in message
        sources = await prompt_tokens_by_source(made[1])
        assert sources["external_kv_transfer"] > STREAMS * BEFORE
        assert sources["local_cache_hit"] > STREAMS * BEFORE / 2  # whole KV blocks of it, when the stream itself came
        await streams.gain(10)
        await streams.stop()
        longest = max(len(tokens) for tokens in streams.tokens)
        streams.assert_begin_of(await run_streams(made[1], count=STREAMS, max_tokens=longest))
    finally:
        await supervisor.close()
