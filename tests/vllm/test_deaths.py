"""vLLM dies in each phase of a move, killed with 32 streams under way, and they go on token-exactly (fp32)."""

import pytest

from engines.errors import EngineDied
from engines.restarts import RestartPolicy
from flexpiped.supervisor import Supervisor
from tests.support.vllm import layout
from tests.vllm.streams import move, run_streams
from tests.vllm.test_recovery import STREAMS, Made, Streams

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop]

TOKENS = 200  # of each stream
OLD, NEW = layout(6), layout(3)  # rank 1 gains what rank 0 loses
# In the order of a move. Only after the last of them is the new layout in force.
DEATHS = (
    ("worker.prepare", 1),
    ("worker.load", 1),
    ("core.begin", None),
    ("core.round", None),
    ("worker.copy_out", 0),
    ("worker.copy_in", 1),
    ("core.commit", None),
    ("worker.commit", 0),
    ("worker.switch", 1),
    ("worker.release", 0),
)


@pytest.mark.long
async def test_streams_survive_a_death_in_each_phase() -> None:
    made = Made()
    policy = RestartPolicy(max_deaths=len(DEATHS) + 1)
    supervisor = Supervisor(factory=made, pipeline=OLD, policy=policy)
    await supervisor.start()
    try:
        expected = await run_streams(made.engines[0], count=STREAMS, max_tokens=TOKENS)
        for number, (name, rank) in enumerate(DEATHS):
            engine = made.engines[number]
            streams = Streams(supervisor)
            await streams.begin(TOKENS)
            await engine.arm_failpoint(name, "kill", rank=rank)
            with pytest.raises(EngineDied, match="engine core" if rank is None else f"worker of rank {rank}"):
                await move(engine, NEW)
            await streams.end()
            assert streams.tokens == [tokens for tokens, _ in expected]
            assert (supervisor.engine, supervisor.pipeline) == (
                made.engines[number + 1],
                NEW if name == "worker.release" else OLD,
            )
    finally:
        await supervisor.close()
