"""The refactorings of one vLLM: are they possible, which one is under way, which layout is in force."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from itertools import count

from engines.errors import EngineError, RefactoringAborted, RefactoringBusy, RefactoringRefused
from engines.protocol import RefactorCheck, RefactorProgress
from engines.vllm.channel import CallFailed, Channel, ChannelClosed
from engines.vllm.handover import MoveSpec, VllmHandover
from engines.vllm.options import VllmOptions, num_kv_blocks
from engines.vllm.ranks import Ranks
from engines.vllm.recompile import Recompilation, Recompiler
from planner.handover import HandoverLimits, HandoverPhase
from planner.layout import Pipeline
from planner.memory import KvBudget, check_memory
from planner.model_graph import ModelGraph
from planner.moves import describe_moves, moves
from topology.device import Device, DeviceKind

_UNKNOWN_MEMORY = 1 << 62  # no budget was given: nothing is refused for it


class VllmHandovers:
    """One refactoring at a time. Owns pipeline and epoch once vLLM is ready.

    Args:
        graph: The model; None where it is not understood, and then nothing moves in place.
        channel: The token channel, for calls of the engine core.
        side_channels: One per rank, by global rank (pipeline rank * tensor parallel degree + tensor parallel rank).
        refusal: Why vLLM as it runs cannot move layers; empty when it can.
        requests_live: How many requests are in flight.
        on_crash: Told when ranks may disagree about the layout in force: the engine is replaced.
        on_recompiled: Told how each return to compiled code ended, after a move in compiled mode.
    """

    def __init__(
        self,
        options: VllmOptions,
        graph: ModelGraph | None,
        channel: Channel,
        side_channels: Mapping[int, Channel],
        *,
        pipeline: Pipeline,
        epoch: int,
        refusal: str,
        requests_live: Callable[[], int],
        on_crash: Callable[[str], None],
        on_recompiled: Callable[[Recompilation], None],
    ) -> None:
        self.pipeline = pipeline
        self.epoch = epoch
        self.refactorings_total = 0
        self._options = options
        self._graph = graph
        self._channel = channel
        self._sides = side_channels
        self._ranks = Ranks(device_ids=options.device_ids, tensor_parallel=options.tensor_parallel)
        self._refusal = refusal or ("" if graph is not None else "the layers of this model are not understood")
        self._requests_live = requests_live
        self._on_crash = on_crash
        self.recompiler = Recompiler(
            channel, side_channels, on_end=on_recompiled, on_crash=on_crash, deadline_s=options.start_deadline_s
        )
        self._numbers = count(1)
        self._is_checking = False
        self._running: VllmHandover | None = None
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
        options, graph = self._options, self._graph
        if target.num_decoders != graph.num_decoders:
            sentence = f"the model has {graph.num_decoders} decoders, but the layout places {target.num_decoders}"
            return RefactorCheck(feasible=False, sentences=(sentence,))
        checked = check_memory(
            graph=graph,
            current=self.pipeline,
            target=target,
            devices=_devices(options),
            kv=KvBudget(
                block_tokens=options.kv_block_tokens,
                capacity_blocks=num_kv_blocks(options) - 1,
                live_blocks=live_blocks,
            ),
        )
        found = moves(self.pipeline, target, graph, live_kv_slots=live_blocks * options.kv_block_tokens)
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
        self._task = asyncio.create_task(self._run(handover, queue), name="vllm-handover")
        while isinstance(item := await queue.get(), RefactorProgress):
            yield item
        if item is not None:
            raise item

    async def cancel(self) -> bool:
        """Roll back what has not been committed; False when there is nothing."""
        return self._running is not None and self._running.cancel()

    def end(self, error: EngineError) -> None:
        """The engine has died or was closed: who waits for a refactoring learns ``error``."""
        self.recompiler.end()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            self._queue.put_nowait(error)

    # --- inside ---

    async def _run(self, handover: VllmHandover, queue: asyncio.Queue[RefactorProgress | EngineError | None]) -> None:
        await self.recompiler.stop()  # what it compiles is not wanted any more
        try:
            state = (await handover.run()).state
        finally:
            self._running = None
            self.refactorings_total += 1
        if self._options.compile:  # also after a rollback: a move before it may have left ranks eager
            self.recompiler.begin(self._ranks.counts_of(self.pipeline))
        aborted = state.phase is HandoverPhase.ABORTED
        queue.put_nowait(RefactoringAborted(state.reason or "rolled back") if aborted else None)

    def _handover(self, target: Pipeline) -> VllmHandover:
        options, queue = self._options, self._queue

        def note(progress: RefactorProgress) -> None:
            if progress.epoch is not None and progress.epoch > self.epoch:
                self.epoch, self.pipeline = progress.epoch, target
            queue.put_nowait(progress)

        return VllmHandover(
            target,
            self._spec(target),
            core=self._channel,
            ranks={rank: self._group(rank) for rank in range(self._ranks.count)},
            limits=HandoverLimits(
                prepare_deadline_s=options.prepare_deadline_s,
                sync_deadline_s=options.sync_deadline_s,
                commit_deadline_s=options.commit_deadline_s,
                max_rounds=options.max_rounds,
                remainder_slots=options.remainder_slots,
            ),
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
            block_tokens=self._options.kv_block_tokens,
            commit_deadline_s=self._options.commit_deadline_s,
            verify_checksums=self._options.verify_checksums,
            weights_total_bytes=sum(move.weight_bytes for move in moves(self.pipeline, target, self._graph)),
            requests_live=self._requests_live,
        )

    def _group(self, rank: int) -> tuple[Channel, ...]:
        degree = self._options.tensor_parallel
        return tuple(self._sides[place] for place in range(rank * degree, (rank + 1) * degree))

    async def _live_blocks(self) -> int:
        try:
            return int((await self._channel.core("counters"))["kv_blocks_used"])
        except (CallFailed, ChannelClosed) as error:
            raise RefactoringRefused(f"vLLM's engine core does not say how full its KV cache is: {error}") from error


def _holders(counts: Sequence[int]) -> tuple[int, ...]:
    """Return the pipeline rank of each decoder."""
    return tuple(rank for rank, decoders in enumerate(counts) for _ in range(decoders))


def _devices(options: VllmOptions) -> tuple[Device, ...]:
    kind = DeviceKind.CUDA if options.cuda else DeviceKind.CPU
    memory = options.device_memory_bytes or _UNKNOWN_MEMORY
    return tuple(Device(id=device, kind=kind, memory_total_bytes=memory) for device in options.device_ids)
