"""The refactorings of one engine: are they possible, which one is under way, which layout is in force."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from engines.errors import EngineError, RefactoringAborted, RefactoringBusy, RefactoringRefused
from engines.protocol import RefactorCheck, RefactorProgress
from engines.served.channel import CallFailed, Channel, ChannelClosed
from engines.served.handover import LayerHandover, MoveSpec
from engines.served.ranks import Ranks
from planner.handover import HandoverLimits, HandoverPhase
from planner.layout import Pipeline
from planner.memory import KvBudget, check_memory
from planner.model_graph import ModelGraph
from planner.moves import describe_moves, moves
from topology.device import Device, DeviceKind

_UNKNOWN_MEMORY = 1 << 62  # no budget was given: nothing is refused for it


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverSetup:
    """What one engine's refactorings need to know of it."""

    ranks: Ranks
    cuda: bool
    device_memory_bytes: int  # budget of each device; 0: unknown
    kv_block_tokens: int
    kv_capacity_blocks: int
    limits: HandoverLimits
    verify_checksums: bool


class AfterMoves(Protocol):
    """Work that follows a move, and that the next move ends."""

    def begin(self, counts: Sequence[int]) -> None:
        """Begin, for a layout with ``counts`` layers on each pipeline rank, which is in force."""

    async def resume(self, counts: Sequence[int]) -> None:
        """Begin where a daemon before this one may have left it."""

    async def stop(self) -> None:
        """Return when none is under way."""

    def end(self) -> None:
        """The engine has ended."""


class Handovers:
    """One refactoring at a time. Owns pipeline and epoch once the engine is ready.

    Args:
        graph: The model; None where it is not understood, and then nothing moves in place.
        channel: For calls of what schedules the engine's steps.
        side_channels: One per rank, by global rank (pipeline rank * tensor parallel degree + tensor parallel rank).
        refusal: Why the engine as it runs cannot move layers; empty when it can.
        requests_live: How many requests are in flight.
        on_crash: Told when ranks may disagree about the layout in force: the engine is replaced.
        after: What follows a move.
        last_number: Of the handovers that it has seen before: late words of one must not be taken for another's.
    """

    def __init__(
        self,
        setup: HandoverSetup,
        graph: ModelGraph | None,
        channel: Channel,
        side_channels: Mapping[int, Channel],
        *,
        pipeline: Pipeline,
        epoch: int,
        refusal: str,
        requests_live: Callable[[], int],
        on_crash: Callable[[str], None],
        after: AfterMoves | None = None,
        last_number: int = 0,
    ) -> None:
        self.pipeline = pipeline
        self.epoch = epoch
        self.refactorings_total = 0
        self._setup = setup
        self._graph = graph
        self._channel = channel
        self._sides = side_channels
        self._ranks = setup.ranks
        self._refusal = refusal or ("" if graph is not None else "the layers of this model are not understood")
        self._requests_live = requests_live
        self._on_crash = on_crash
        self._after = after
        self._numbers = count(last_number + 1)
        self._is_checking = False
        self._running: LayerHandover | None = None
        self._task: asyncio.Task[None] | None = None
        self._queue: asyncio.Queue[RefactorProgress | EngineError | None] = asyncio.Queue()

    async def check(self, target: Pipeline) -> RefactorCheck:
        """Say whether ``refactor`` would be accepted, with the memory of both layouts together."""
        if target == self.pipeline:
            return RefactorCheck(feasible=False, sentences=("this layout is in force already",))
        reason = self._refusal or self._ranks.refusal_of(target)
        if reason or self._graph is None:
            return RefactorCheck(feasible=False, sentences=(reason or self._refusal,), needs_replica=True)
        live_blocks = await self._live_blocks()
        setup, graph = self._setup, self._graph
        if target.num_decoders != graph.num_decoders:
            sentence = f"the model has {graph.num_decoders} decoders, but the layout places {target.num_decoders}"
            return RefactorCheck(feasible=False, sentences=(sentence,))
        checked = check_memory(
            graph=graph,
            current=self.pipeline,
            target=target,
            devices=_devices(setup),
            kv=KvBudget(
                block_tokens=setup.kv_block_tokens, capacity_blocks=setup.kv_capacity_blocks, live_blocks=live_blocks
            ),
        )
        found = moves(self.pipeline, target, graph, live_kv_slots=live_blocks * setup.kv_block_tokens)
        return RefactorCheck(feasible=checked.fits, sentences=checked.sentences, moves=(describe_moves(found),))

    async def refactor(self, target: Pipeline) -> AsyncIterator[RefactorProgress]:
        """Move the layers. Closing the iterator does not cancel."""
        if self._running is not None:
            raise RefactoringBusy(f"another refactoring is under way: {self._running.describe()}")
        if self._is_checking:
            raise RefactoringBusy("another refactoring is being checked")
        self._is_checking = True
        try:
            check = await self.check(target)
        finally:
            self._is_checking = False
        if not check.feasible:
            raise RefactoringRefused("; ".join(check.sentences))
        queue = self._queue = asyncio.Queue()
        handover = self._running = self._handover(target)
        self._task = asyncio.create_task(self._run(handover, queue), name="engine-handover")
        while isinstance(item := await queue.get(), RefactorProgress):
            yield item
        if item is not None:
            raise item

    async def resume(self) -> None:
        """Begin what follows a move that a daemon before this one may have made."""
        if self._after is not None:
            await self._after.resume(self._ranks.counts_of(self.pipeline))

    async def cancel(self) -> bool:
        """Roll back what has not been committed; False when there is nothing."""
        return self._running is not None and self._running.cancel()

    def end(self, error: EngineError) -> None:
        """The engine has died or was closed: who waits for a refactoring learns ``error``."""
        if self._after is not None:
            self._after.end()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            self._queue.put_nowait(error)

    # --- inside ---

    async def _run(self, handover: LayerHandover, queue: asyncio.Queue[RefactorProgress | EngineError | None]) -> None:
        if self._after is not None:
            await self._after.stop()  # what it makes is not wanted any more
        try:
            state = (await handover.run()).state
        finally:
            self._running = None
            self.refactorings_total += 1
        if self._after is not None:  # also after a rollback: a move before it may have left something to do
            self._after.begin(self._ranks.counts_of(self.pipeline))
        aborted = state.phase is HandoverPhase.ABORTED
        queue.put_nowait(RefactoringAborted(state.reason or "rolled back") if aborted else None)

    def _handover(self, target: Pipeline) -> LayerHandover:
        queue = self._queue

        def note(progress: RefactorProgress) -> None:
            if progress.epoch is not None and progress.epoch > self.epoch:
                self.epoch, self.pipeline = progress.epoch, target
            queue.put_nowait(progress)

        return LayerHandover(
            target,
            self._spec(target),
            core=self._channel,
            ranks={rank: self._group(rank) for rank in range(self._ranks.count)},
            limits=self._setup.limits,
            on_progress=note,
            on_crash=self._on_crash,
        )

    def _spec(self, target: Pipeline) -> MoveSpec:
        assert self._graph is not None, "the check has passed"
        return MoveSpec(
            number=next(self._numbers),
            epoch=self.epoch + 1,
            layout=_holders(self._ranks.counts_of(self.pipeline)),
            new_layout=_holders(self._ranks.counts_of(target)),
            block_tokens=self._setup.kv_block_tokens,
            commit_deadline_s=self._setup.limits.commit_deadline_s,
            verify_checksums=self._setup.verify_checksums,
            weights_total_bytes=sum(move.weight_bytes for move in moves(self.pipeline, target, self._graph)),
            requests_live=self._requests_live,
        )

    def _group(self, rank: int) -> tuple[Channel, ...]:
        degree = self._ranks.tensor_parallel
        return tuple(self._sides[place] for place in range(rank * degree, (rank + 1) * degree))

    async def _live_blocks(self) -> int:
        try:
            return int((await self._channel.core("counters"))["kv_blocks_used"])
        except (CallFailed, ChannelClosed) as error:
            raise RefactoringRefused(f"the engine does not say how full its KV cache is: {error}") from error


def _holders(counts: Sequence[int]) -> tuple[int, ...]:
    """Return the pipeline rank of each decoder."""
    return tuple(rank for rank, decoders in enumerate(counts) for _ in range(decoders))


def _devices(setup: HandoverSetup) -> tuple[Device, ...]:
    kind = DeviceKind.CUDA if setup.cuda else DeviceKind.CPU
    memory = setup.device_memory_bytes or _UNKNOWN_MEMORY
    return tuple(Device(id=device, kind=kind, memory_total_bytes=memory) for device in setup.ranks.device_ids)
