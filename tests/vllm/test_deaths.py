"""vLLM dies in each phase of a move, killed with 32 streams under way, and they go on token-exactly (fp32)."""

from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

import pytest
import pytest_asyncio

from engines.errors import EngineDied
from engines.restarts import RestartPolicy
from engines.vllm.adapter import VllmEngine
from flexpiped.supervisor import Supervisor
from tests.support.vllm import layout
from tests.vllm.recovering import Streams
from tests.vllm.streams import Result, move, run_streams
from tests.vllm.test_recovery import STREAMS, Made

pytestmark = [
    pytest.mark.engine,
    pytest.mark.vllm,
    pytest.mark.real_loop,
    pytest.mark.long,
    pytest.mark.asyncio(loop_scope="module"),
]

TOKENS = 200  # of each stream
OLD, NEW = layout(6), layout(3)  # rank 1 gains what rank 0 loses
# In the order of a move. Only with the last of them has the new layout been in force.
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


@dataclass(frozen=True, slots=True)
class Mortal:
    """vLLM under a supervisor that never gives it up, and what undisturbed streams give."""

    made: Made
    supervisor: Supervisor
    expected: Result

    @property
    def engine(self) -> VllmEngine:
        return self.made.engines[-1]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mortal() -> AsyncIterator[Mortal]:
    made = Made()
    supervisor = Supervisor(factory=made, pipeline=OLD, policy=RestartPolicy(max_deaths=len(DEATHS) + 1))
    await supervisor.start()
    expected = await run_streams(made.engines[0], count=STREAMS, max_tokens=TOKENS)
    yield Mortal(made, supervisor, expected)
    await supervisor.close()


@pytest.mark.parametrize(("name", "rank"), DEATHS)
async def test_streams_survive_a_death(mortal: Mortal, name: str, rank: int | None) -> None:
    engine, streams = mortal.engine, Streams(mortal.supervisor, count=STREAMS)
    await streams.begin(TOKENS)
    await engine.arm_failpoint(name, "kill", rank=rank)
    is_committed = name == "worker.release"  # then the move has succeeded, and may still end before the death is seen
    with suppress(EngineDied) if is_committed else pytest.raises(EngineDied):
        await move(engine, NEW)
    assert ("vLLM's engine core" if rank is None else f"vLLM's worker of rank {rank}") in await engine.died()
    await streams.end()
    assert streams.tokens == [tokens for tokens, _ in mortal.expected]
    assert mortal.engine is not engine
    assert mortal.supervisor.pipeline == (NEW if is_committed else OLD)
