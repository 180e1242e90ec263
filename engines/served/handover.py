"""Moves layers between the pipeline ranks of a running engine.

What must stand between two steps is called where they are scheduled; what need not wait for one goes to each worker's
side channel. The plugin inside the engine does the work, this says when. A failure before the commit rolls back; when
ranks may disagree about the layout afterwards, that is a crash, and the whole engine is replaced.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from engines.handover_loop import HandoverLoop, WorkFailed
from engines.protocol import RefactorProgress
from engines.served.channel import CallFailed, Channel, ChannelClosed, Message
from planner import handover_events as e
from planner.handover import HandoverLimits
from planner.layout import Pipeline

_PAUSE_WAIT_S = 0.5
_PAUSE_POLL_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveSpec:
    """What a handover needs to know. Layouts name, for each decoder, the pipeline rank that holds it."""

    number: int
    epoch: int  # of the layout that it brings
    layout: tuple[int, ...]
    new_layout: tuple[int, ...]
    block_tokens: int
    commit_deadline_s: float
    verify_checksums: bool
    weights_total_bytes: int
    requests_live: Callable[[], int]

    @property
    def participants(self) -> frozenset[int]:
        """Pipeline ranks that gain or lose a layer."""
        changed = (pair for pair in zip(self.layout, self.new_layout, strict=True) if pair[0] != pair[1])
        return frozenset(rank for pair in changed for rank in pair)


class LayerHandover(HandoverLoop):
    """One handover.

    Args:
        ranks: Side channels by pipeline rank; several where a stage is tensor parallel.
        on_crash: Told when ranks may disagree about the layout in force.
    """

    def __init__(
        self,
        target: Pipeline,
        spec: MoveSpec,
        *,
        core: Channel,
        ranks: Mapping[int, tuple[Channel, ...]],
        limits: HandoverLimits,
        on_progress: Callable[[RefactorProgress], None],
        on_crash: Callable[[str], None],
    ) -> None:
        super().__init__(target, limits=limits, weights_total_bytes=spec.weights_total_bytes, on_progress=on_progress)
        self._spec = spec
        self._core = core
        self._ranks = [rank for stage in sorted(spec.participants) for rank in ranks[stage]]
        self._on_crash = on_crash
        self._loaded_bytes: dict[int, int] = {}

    async def prepare(self) -> None:
        spec = self._spec
        # One at a time: loading beside the steps of all ranks costs the streams less than loading everywhere at once.
        for index, rank in enumerate(self._ranks):
            await self._try(
                rank.call(
                    "prepare",
                    on_progress=partial(self._note_loaded, index),
                    handover=spec.number,
                    layout=spec.layout,
                    new_layout=spec.new_layout,
                )
            )
        await self._try(self._core.core("begin", spec.number, spec.new_layout))
        self.tell(e.Prepared())

    async def copy_round(self) -> None:
        sent = await self._try(self._core.core("round", self._spec.number))
        slots = self._spec.block_tokens
        self.tell(
            e.RoundSent(
                sent_slots=sent["sent_blocks"] * slots,
                sent_bytes=sent["sent_bytes"],
                remainder_slots=sent["remainder_blocks"] * slots,
            )
        )

    async def commit(self) -> None:
        spec = self._spec
        if self.has_events:  # cancelled or failed meanwhile: that comes first, and rolls back
            return
        self.make_final()
        done = await self._try(self._core.core("commit", spec.number, spec.commit_deadline_s, spec.verify_checksums))
        if done.get("crash"):
            self._on_crash(done["crash"])
            raise WorkFailed(done["crash"])
        self.committed(epoch=spec.epoch, drain_s=done["drain_s"])

    async def retire(self) -> None:
        await self._note_pause()
        await self._release()
        self.tell(e.Retired())

    async def roll_back(self) -> None:
        await self._try(self._core.core("abandon", self._spec.number))
        await self._release()
        self.tell(e.RolledBack())

    def news(self, progress: RefactorProgress) -> RefactorProgress:
        return replace(
            progress, weights_bytes=sum(self._loaded_bytes.values()), requests_live=self._spec.requests_live()
        )

    # --- inside ---

    async def _release(self) -> None:
        returned = 0
        for rank in self._ranks:
            released = await self._try(rank.call("release", handover=self._spec.number))
            returned += released["weights_bytes"] + released["kv_bytes"]
        self.note(returned_bytes=returned)

    async def _note_pause(self) -> None:
        """Learn the commit pause, which ends with the first step of the new epoch; without work there is none."""
        give_up_s = asyncio.get_running_loop().time() + _PAUSE_WAIT_S
        while asyncio.get_running_loop().time() < give_up_s:
            pause_s = (await self._try(self._core.core("pause")))["pause_s"]
            if pause_s is not None:
                self.note(commit_pause_s=pause_s)
                return
            if not self._spec.requests_live():
                break
            await asyncio.sleep(_PAUSE_POLL_S)
        self.note(commit_pause_s=0.0)

    def _note_loaded(self, index: int, news: Message) -> None:
        self._loaded_bytes[index] = news["weights_bytes"]
        self.report()

    async def _try(self, answer: Awaitable[Any]) -> dict[str, Any]:
        try:
            result: dict[str, Any] = await answer
        except (CallFailed, ChannelClosed) as error:
            raise WorkFailed(str(error)) from error
        return result
