"""The loop that carries a handover out: what comes in just before the commit point still counts."""

import asyncio
from collections.abc import Callable

import pytest

from engines.handover_loop import HandoverLoop
from engines.protocol import RefactorProgress
from planner import handover_events as e
from planner.handover import HandoverLimits, HandoverPhase
from tests.support.layouts import even_pipeline


class Quick(HandoverLoop):
    """Has nothing to do. ``before_commit`` happens where a commit waits for its last copy."""

    def __init__(self, before_commit: Callable[[], object], *, turns: int) -> None:
        super().__init__(even_pipeline(2), limits=HandoverLimits(), weights_total_bytes=0, on_progress=lambda _: None)
        self._before_commit = before_commit
        self._turns = turns

    async def prepare(self) -> None:
        self.tell(e.Prepared())

    async def copy_round(self) -> None:
        self.tell(e.RoundSent(sent_slots=0, sent_bytes=0, remainder_slots=0))

    async def commit(self) -> None:
        await asyncio.sleep(1.0)
        self._before_commit()
        for _ in range(self._turns):
            await asyncio.sleep(0)
        if not self.has_events:
            self.committed(epoch=1)

    async def retire(self) -> None:
        self.tell(e.Retired())

    async def roll_back(self) -> None:
        self.tell(e.RolledBack())

    def news(self, progress: RefactorProgress) -> RefactorProgress:
        return progress


@pytest.mark.parametrize("turns", range(5))
async def test_a_cancellation_that_was_accepted_keeps_the_old_layout_however_near_the_commit_is(turns: int) -> None:
    accepted: list[bool] = []
    loop = Quick(lambda: accepted.append(loop.cancel()), turns=turns)
    result = await loop.run()
    assert (accepted, result.state.phase) == ([True], HandoverPhase.ABORTED)


async def test_a_participant_that_is_lost_just_before_the_commit_rolls_back() -> None:
    loop = Quick(lambda: loop.tell(e.ParticipantLost("killed by a test")), turns=1)
    assert (await loop.run()).state.phase is HandoverPhase.ABORTED
