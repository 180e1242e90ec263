"""An engine dies in each phase of a move, killed with streams under way, which go on under its supervisor (fp32)."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import pytest

from engines.errors import EngineDied
from engines.protocol import Engine
from engines.restarts import RestartPolicy
from engines.served.engine import ServedEngine
from flexpiped.supervisor import Supervisor
from planner.layout import Pipeline
from tests.support.vllm import layout
from tests.vllm.recovering import Streams
from tests.vllm.streams import Result, move, run_streams

TOKENS = 200  # of each stream
OLD, NEW = layout(6), layout(3)  # rank 1 gains what rank 0 loses
# Failpoints in the order of a move, and the rank; None: what schedules steps. Only with the last of them has the new
# layout been in force.
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


class Maker(Protocol):
    """Makes engines, and remembers them."""

    @property
    def engines(self) -> Sequence[ServedEngine]: ...

    def __call__(self, pipeline: Pipeline, epoch: int) -> Engine: ...


@dataclass(frozen=True, slots=True)
class Mortal:
    """An engine under a supervisor that never gives it up, and what undisturbed streams give."""

    made: Maker
    supervisor: Supervisor
    expected: Result

    async def survives(self, name: str, rank: int | None, *, called: str) -> None:
        """Kill the process that is ``called`` so where a move passes that failpoint: every stream goes on."""
        engine, streams = self.made.engines[-1], Streams(self.supervisor, count=len(self.expected))
        await streams.begin(TOKENS)
        await engine.arm_failpoint(name, "kill", rank=rank)
        is_committed = name == "worker.release"  # the move has succeeded, and may still end before the death is seen
        with suppress(EngineDied) if is_committed else pytest.raises(EngineDied):
            await move(engine, NEW)
        assert called in await engine.died()
        await streams.end()
        assert streams.tokens == [tokens for tokens, _ in self.expected]
        assert self.made.engines[-1] is not engine
        assert self.supervisor.pipeline == (NEW if is_committed else OLD)


@asynccontextmanager
async def mortal(made: Maker, *, count: int) -> AsyncIterator[Mortal]:
    """Start an engine that dies often, and have ``count`` streams run undisturbed."""
    supervisor = Supervisor(factory=made, pipeline=OLD, policy=RestartPolicy(max_deaths=len(DEATHS) + 1))
    await supervisor.start()
    try:
        yield Mortal(made, supervisor, await run_streams(made.engines[0], count=count, max_tokens=TOKENS))
    finally:
        await supervisor.close()
