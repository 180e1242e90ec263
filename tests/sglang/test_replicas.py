"""Two SGLangs serve at the same time: when a process of one is killed, its streams go on at once at the other."""

import os
import signal
import time
from collections.abc import AsyncIterator

import pytest

from engines.sglang.adapter import SglangEngine
from flexpiped.replicas import Replica, Replicas
from flexpiped.supervisor import Supervisor
from tests.sglang.recovering import Made, pid_of
from tests.support.until import until
from tests.support.vllm import layout
from tests.vllm.recovering import Streams
from tests.vllm.streams import STREAMS, run_streams

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.long]
BACK_S = 300.0
TOKENS = 20  # of each stream after a death
LENGTH = 160  # of each stream: the KV cache of one replica has room for all of them, else some would wait in its queue


@pytest.fixture
async def replicas() -> AsyncIterator[Replicas]:
    replicas = Replicas(make=Supervisor)
    yield replicas
    await replicas.close()


async def test_streams_go_on_at_once_at_the_other_replica(
    replicas: Replicas, capsys: pytest.CaptureFixture[str]
) -> None:
    """Token-exactly, and before the engine that was killed is back."""
    made = Made()
    first = await replicas.add(layout(4), factory=made)
    second = await replicas.add(layout(2), factory=made)
    rounds = []
    for dies, other, victim in ((second, first, "the last scheduler"), (first, second, "the API server")):
        streams = Streams(replicas, count=STREAMS)
        await streams.begin(max_tokens=LENGTH)
        killed_s = time.monotonic()
        await kill(dies, replicas, victim)
        await streams.gain(TOKENS)
        assert dies.engine is None, "it was back before the streams had gone on"
        assert len(replicas.flights.at(serving(other))) == STREAMS
        await streams.stop()
        rounds.append(streams)
        await until(lambda dies=dies: dies.engine is not None, timeout_s=BACK_S)
        back_s = time.monotonic() - killed_s
        with capsys.disabled():
            gaps = " ".join(f"{gap_s:.2f}" for gap_s in streams.gaps_s)
            print(f"\n{victim} killed: longest gap of each stream {gaps} s; its engine was back after {back_s:.0f} s")
    assert len(made.engines) == 4

    lengths = [max(map(len, tokens)) for tokens in zip(*(streams.tokens for streams in rounds), strict=True)]
    undisturbed = await run_streams(serving(first), count=STREAMS, lengths=lengths)
    for streams in rounds:
        streams.assert_begin_of(undisturbed)


async def kill(dies: Replica, replicas: Replicas, victim: str) -> None:
    """Kill a process of a replica that has some of the streams."""
    engine = serving(dies)
    assert len(replicas.flights.at(engine)) >= 2
    os.kill(pid_of(engine, victim), signal.SIGKILL)


def serving(replica: Replica) -> SglangEngine:
    assert isinstance(replica.engine, SglangEngine)
    return replica.engine
