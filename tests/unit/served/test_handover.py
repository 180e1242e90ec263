"""A move's order of calls, its roll back and its crash, against channels that answer from memory."""

import asyncio
from collections.abc import Callable
from typing import Any

from engines.protocol import RefactorProgress
from engines.served.channel import CallFailed
from engines.served.handover import LayerHandover, MoveSpec
from planner.handover import HandoverLimits, HandoverPhase
from planner.layout import pipeline_of

TARGET = pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[3], num_decoders=8)
SPEC = MoveSpec(
    number=7,
    epoch=4,
    layout=(0, 0, 0, 0, 1, 1, 1, 1),
    new_layout=(0, 0, 0, 1, 1, 1, 1, 1),
    block_tokens=32,
    commit_deadline_s=1.0,
    verify_checksums=True,
    weights_total_bytes=100,
    requests_live=lambda: 1,
)
ANSWERS: dict[str, Any] = {
    "begin": {"live_blocks": 3},
    "round": {"sent_blocks": 3, "sent_bytes": 300, "remainder_blocks": 1},
    "commit": {"epoch": 1, "drain_s": 0.001},
    "pause": {"pause_s": 0.002},
    "abandon": {},
    "prepare": {},
    "release": {"weights_bytes": 100, "kv_bytes": 50},
}


class Answering:
    """Stands for a channel: answers calls from a table and notes them."""

    def __init__(self, seen: list[str], answers: dict[str, Any]) -> None:
        self._seen, self._answers = seen, answers

    async def core(self, method: str, *_arguments: object) -> Any:
        return await self._answer(method)

    async def call(self, op: str, *, on_progress: Callable[[Any], None] | None = None, **_fields: object) -> Any:
        if on_progress is not None:
            on_progress({"weights_bytes": 100})
        return await self._answer(op)

    async def _answer(self, name: str) -> Any:
        self._seen.append(name)
        await asyncio.sleep(0)
        answer = self._answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer


def handover(seen: list[str], reports: list[RefactorProgress], crashes: list[str], **changed: Any) -> LayerHandover:
    channel: Any = Answering(seen, ANSWERS | changed)
    return LayerHandover(
        TARGET,
        SPEC,
        core=channel,
        ranks={0: (channel,), 1: (channel,)},
        limits=HandoverLimits(
            prepare_deadline_s=5, sync_deadline_s=5, commit_deadline_s=5, max_rounds=3, remainder_slots=64
        ),
        on_progress=reports.append,
        on_crash=crashes.append,
    )


async def test_a_move_prepares_copies_commits_and_releases() -> None:
    seen: list[str] = []
    reports: list[RefactorProgress] = []
    result = await handover(seen, reports, []).run()
    assert result.state.phase is HandoverPhase.DONE
    assert seen == ["prepare", "prepare", "begin", "round", "commit", "pause", "release", "release"]
    last = reports[-1]
    assert (last.epoch, last.commit_pause_s, last.drain_s, last.returned_bytes) == (4, 0.002, 0.001, 300)
    assert (last.kv_bytes, last.weights_bytes) == (300, 200)


async def test_what_fails_before_the_commit_is_rolled_back() -> None:
    for name in ("prepare", "begin", "round", "commit"):
        seen: list[str] = []
        result = await handover(seen, [], [], **{name: CallFailed("no")}).run()
        assert (result.state.phase, result.state.reason) == (HandoverPhase.ABORTED, "no")
        assert seen[-3:] == ["abandon", "release", "release"]


async def test_ranks_that_may_disagree_are_a_crash() -> None:
    crashes: list[str] = []
    await handover([], [], crashes, commit={"crash": "rank 1 did not answer"}).run()
    assert crashes == ["rank 1 did not answer"]


async def test_nothing_cancels_a_commit_that_was_sent() -> None:
    seen: list[str] = []
    answers: list[bool] = []

    def note(progress: RefactorProgress) -> None:
        if progress.phase is HandoverPhase.COMMITTING and not answers:
            asyncio.get_running_loop().call_later(0.01, lambda: answers.append(moving.cancel()))

    class Slow(Answering):
        async def core(self, method: str, *_arguments: object) -> Any:
            if method == "commit":
                await asyncio.sleep(0.05)
            return await super().core(method)

    channel: Any = Slow(seen, ANSWERS)
    moving = LayerHandover(
        TARGET,
        SPEC,
        core=channel,
        ranks={0: (channel,), 1: (channel,)},
        limits=HandoverLimits(
            prepare_deadline_s=5, sync_deadline_s=5, commit_deadline_s=0.01, max_rounds=3, remainder_slots=64
        ),
        on_progress=note,
        on_crash=lambda _reason: None,
    )
    result = await moving.run()
    assert answers == [False]
    assert result.state.phase is HandoverPhase.DONE
