"""Requests that come, end and are given up while layers move, and what of it happened in which phase of a move."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from typing import Final

from engines.protocol import Engine, GenerationRequest
from planner.handover import HandoverPhase
from planner.layout import Pipeline
from tests.vllm.streams import collect, stream

# One failpoint of each phase. A rank that is slow there makes the phase long enough for something to happen in it.
SLOW_POINTS: Final = {
    HandoverPhase.PREPARING: "worker.prepare",
    HandoverPhase.SYNCING: "worker.copy_in",
    HandoverPhase.COMMITTING: "worker.commit",
    HandoverPhase.RETIRING: "worker.release",
}
LENGTHS: Final = tuple(5 + 10 * (index % 4) for index in range(10))  # tokens of each guest
_LONG, _SALT = 150, 4
_POLL_S = 0.01


class Visit(Enum):
    COMES = "comes"
    ENDS = "ends"
    LEAVES = "leaves"  # its client hangs up
    IS_RETRACTED = "is retracted"


# In a commit no batch is begun, so none is made smaller.
WANTED: Final = frozenset((phase, visit) for phase in SLOW_POINTS for visit in Visit) - {
    (HandoverPhase.COMMITTING, Visit.IS_RETRACTED)
}


class Visitors:
    """Guests that ask for a short answer again and again, and one at a time that leaves when the next phase begins."""

    def __init__(self, engine: Engine) -> None:
        self.seen: set[tuple[HandoverPhase, Visit]] = set()
        self._engine = engine
        self._phase: HandoverPhase | None = None
        self._has_begun = asyncio.Event()  # a phase
        self._is_over = False

    @property
    def missing(self) -> list[str]:
        """What has not happened in some phase, in words."""
        return sorted(f"{visit.value} in {phase.name}" for phase, visit in WANTED - self.seen)

    @asynccontextmanager
    async def visiting(self) -> AsyncIterator[None]:
        """Have them come and go; every guest gets what it gets alone."""
        alone = [(await collect(self._engine, short(index)))[0] for index in range(len(LENGTHS))]
        guests = [asyncio.create_task(self._come_again(index, tokens)) for index, tokens in enumerate(alone)]
        others = [asyncio.create_task(each) for each in (self._leave_in_each_phase(), self._watch_retractions())]
        try:
            yield
        finally:
            self._is_over = True
            for each in others:
                each.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.gather(*guests)

    async def see(self, target: Pipeline) -> None:
        """Have layers moved."""
        async for report in self._engine.refactor(target):
            if report.phase is not self._phase:
                self._phase = report.phase
                self._has_begun.set()
        self._phase = None

    async def _come_again(self, index: int, alone: Sequence[int]) -> None:
        while not self._is_over:
            self._note(Visit.COMES)
            tokens, _ = await collect(self._engine, short(index))
            self._note(Visit.ENDS)
            assert tokens == alone

    async def _leave_in_each_phase(self) -> None:
        while True:
            staying = asyncio.create_task(collect(self._engine, stream(len(LENGTHS), max_tokens=_LONG, salt=_SALT)))
            try:
                await self._has_begun.wait()
            finally:
                self._has_begun.clear()
                if staying.cancel():
                    self._note(Visit.LEAVES)
                await asyncio.gather(staying, return_exceptions=True)
            self._note(Visit.COMES)

    async def _watch_retractions(self) -> None:
        phase, before = self._phase, (await self._engine.counters()).preemptions_total
        while True:
            await asyncio.sleep(_POLL_S)
            now = (await self._engine.counters()).preemptions_total
            if now > before and phase is self._phase:
                self._note(Visit.IS_RETRACTED)
            phase, before = self._phase, now

    def _note(self, visit: Visit) -> None:
        if self._phase in SLOW_POINTS:
            self.seen.add((self._phase, visit))


def short(index: int) -> GenerationRequest:
    """Return what a guest asks for."""
    return stream(index, max_tokens=LENGTHS[index], salt=_SALT)
