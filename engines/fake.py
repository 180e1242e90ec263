"""A public fake engine: no model and no processes, the same contract, and knobs for what tests need to happen."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace

from engines.closing import closing
from engines.errors import (
    EngineError,
    EngineStartFailed,
    KvTransferFailed,
    RefactoringRefused,
)
from engines.fake_adapters import FakeAdapters
from engines.fake_batch import Batch, NextToken, Sequence, hashed_tokens
from engines.fake_handover import FakeHandovers, Sleep, check_target
from engines.fake_kv import FakeKv
from engines.life import Life
from engines.offers import KvParcel, KvRange
from engines.protocol import (
    EngineCapabilities,
    EngineCounters,
    GenerationRequest,
    RefactorCheck,
    RefactorProgress,
    StageStatus,
    TokenChunk,
)
from engines.validation import check_request
from planner.handover import HandoverPhase
from planner.layout import Pipeline, Stage

_Outbox = asyncio.Queue[TokenChunk | EngineError]

FAKE_CAPABILITIES = EngineCapabilities(
    name="fake",
    max_model_len=512,
    vocab_size=512,
    eos_token_ids=(0,),
    refactors_in_place=True,
    max_stages=8,
    tensor_parallel=False,
    kv_range=KvRange(least_blocks=33, most_blocks=4096),
    changes_adapters=True,
)
# The same with all that an engine may have; the fake takes further parameters, and its tokens do not depend on them.
RICH_CAPABILITIES = replace(
    FAKE_CAPABILITIES,
    grammars=True,
    top_logprobs=True,
    engine_params=frozenset(
        {"allowed_token_ids", "bad_words", "frequency_penalty", "logit_bias", "min_p", "min_tokens"}
        | {"presence_penalty", "repetition_penalty"}
    ),
)
_DECODER_BYTES = 1 << 20
_KV_BLOCK_BYTES = 1 << 10


class FakeEngine:
    """An ``Engine`` whose steps take ``step_s`` each; one step gives every running request one token.

    Args:
        pipeline, epoch: In force at start.
        next_token: Where tokens come from; by default ``hashed_tokens``, so a resumed request goes on exactly.
        step_s, refactor_phase_s: Duration of a step and of a phase of a refactoring, through ``sleep``.
        start_failure: When given, ``start`` fails with this sentence.
        resident_ranks: When given, a layout of more stages cannot be had in place and needs a second instance.
    """

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        epoch: int = 0,
        capabilities: EngineCapabilities = FAKE_CAPABILITIES,
        next_token: NextToken | None = None,
        step_s: float = 0.0,
        refactor_phase_s: float = 0.0,
        sleep: Sleep = asyncio.sleep,
        kv_block_tokens: int = 16,
        kv_blocks_capacity: int = 4096,
        max_running: int = 256,
        start_failure: str | None = None,
        resident_ranks: int | None = None,
    ) -> None:
        self._pipeline = pipeline
        if capabilities.kv_range is not None:
            least = capabilities.max_model_len // kv_block_tokens + 1
            bounds = KvRange(least_blocks=least, most_blocks=kv_blocks_capacity)
            capabilities = capabilities if capabilities.kv_range == bounds else replace(capabilities, kv_range=bounds)
        self._capabilities = capabilities
        self.adapters = FakeAdapters(capabilities.adapters, on_change=self._name_adapters)
        self.busy: dict[int, float] = {}  # share of the time that stages compute; one that is not in it does not say
        self._batch = Batch(
            capabilities=capabilities,
            next_token=next_token or hashed_tokens(capabilities.vocab_size),
            kv_block_tokens=kv_block_tokens,
            kv_blocks_capacity=kv_blocks_capacity,
            max_running=max_running,
        )
        self.kv = FakeKv()
        self._outboxes: dict[Sequence, _Outbox] = {}
        self._step_s = step_s
        self._sleep = sleep
        self._start_failure = start_failure
        self._resident_ranks = resident_ranks
        self._handovers = FakeHandovers(
            phase_s=refactor_phase_s,
            sleep=sleep,
            report=self._report,
            commit=self._commit,
            ended=lambda: self._life.end,
        )
        self._epoch = epoch
        self._held = False
        self._may_step = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._life = Life(on_end=self._tell_end)
        self._stepping: asyncio.Task[None] | None = None
        self._prompt_tokens_total = 0

    # What tests turn.

    def kill(self, reason: str) -> None:
        """Die as a crashed process would: streams and ``died`` learn ``reason`` at once, and all memory is gone."""
        if self._life.end is None:
            self._life.die(reason)

    def hold(self) -> None:
        """Stop stepping, as a long prefill would, until ``release``."""
        self._held = True
        self._wake()

    def release(self) -> None:
        self._held = False
        self._wake()

    def hold_refactoring(self) -> None:
        """Keep a refactoring in the phase it is in (or starts with), until ``release_refactoring``."""
        self._handovers.hold()

    def release_refactoring(self) -> None:
        self._handovers.release()

    # The protocol.

    @property
    def capabilities(self) -> EngineCapabilities:
        return self._capabilities

    @property
    def pipeline(self) -> Pipeline:
        return self._pipeline

    @property
    def epoch(self) -> int:
        return self._epoch

    async def start(self, *, on_progress: Callable[[str], None]) -> None:
        on_progress("starting the fake engine")
        if self._start_failure is not None:
            raise EngineStartFailed(self._start_failure)
        self._life.begin()
        self._stepping = asyncio.create_task(self._run(), name="fake-engine")

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        self._life.ensure()
        check_request(request, self._capabilities)
        sequence, outbox = self._batch.add(self.kv.as_cached(request)), _Outbox()
        self._outboxes[sequence] = outbox
        self._prompt_tokens_total += len(request.prompt_token_ids)
        self._wake()
        try:
            while True:
                item = await outbox.get()
                if isinstance(item, EngineError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._batch.remove(sequence)
            del self._outboxes[sequence]
            self._wake()

    async def counters(self) -> EngineCounters:
        self._life.ensure()
        batch = self._batch
        return EngineCounters(
            running=len(batch.running),
            waiting=len(batch.waiting),
            kv_blocks_used=batch.kv_blocks_used,
            kv_blocks_capacity=batch.kv_blocks_capacity,
            kv_block_tokens=batch.kv_block_tokens,
            prompt_tokens_total=self._prompt_tokens_total,
            generated_tokens_total=batch.generated_tokens_total,
            preemptions_total=batch.preemptions_total,
            steps_total=batch.steps_total,
            worker_restarts_total=0,
            refactorings_total=self._handovers.total,
        )

    async def stages(self) -> tuple[StageStatus, ...]:
        self._life.ensure()
        return tuple(
            status_of(index, stage, busy=self.busy.get(index)) for index, stage in enumerate(self._pipeline.stages)
        )

    async def check_refactor(self, target: Pipeline) -> RefactorCheck:
        self._life.ensure()
        return self._check(target)

    async def refactor(self, target: Pipeline) -> AsyncIterator[RefactorProgress]:
        self._life.ensure()
        async with closing(self._handovers.run(target, self._check(target))) as reports:
            async for report in reports:
                yield report

    async def cancel_refactor(self) -> bool:
        return self._handovers.cancel()

    async def drain(self) -> None:
        self._life.ensure()
        await self._idle.wait()

    async def died(self) -> str:
        return await self._life.died()

    async def close(self) -> None:
        self._life.close()
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.wait([self._stepping])
        await self._handovers.close()
        self.kv.close()

    # KvResizing, for capabilities with a ``kv_range``.

    async def resize_kv(self, blocks: int) -> int:
        self._life.ensure()
        bounds = self._capabilities.kv_range
        if bounds is None or not bounds.least_blocks <= blocks <= bounds.most_blocks:
            raise RefactoringRefused(f"there cannot be {blocks} KV blocks")
        self._handovers.ensure_none()
        fewer = self._batch.kv_blocks_capacity - blocks
        self._batch.resize_kv(blocks)
        return max(0, fewer) * _KV_BLOCK_BYTES

    # AdapterChanges, for capabilities that say so.

    @property
    def adapter_directories(self) -> Mapping[str, str]:
        return self.adapters.directories

    @property
    def adapter_bytes(self) -> int:
        return self.adapters.device_bytes

    async def load_adapter(self, name: str, directory: str) -> None:
        self._life.ensure()
        self.adapters.load(name, directory)

    async def announce_unload(self, name: str) -> None:
        self.adapters.announce(name)

    async def unload_adapter(self, name: str) -> None:
        self._life.ensure()
        self.adapters.unload(name)

    def _name_adapters(self, names: tuple[str, ...]) -> None:
        self._capabilities = replace(self._capabilities, adapters=names)

    # KvTransfers, for capabilities with a ``kv_form``.

    async def export_kv(self, request_id: str) -> KvParcel:
        self._life.ensure()
        for sequence in self._batch.running:
            if sequence.request.request_id == request_id:
                return self.kv.export(sequence.request, num_generated=sequence.num_generated)
        raise KvTransferFailed("it has computed nothing yet")

    async def accept_kv(self, parcel: KvParcel) -> None:
        self._life.ensure()
        self.kv.accept(parcel)

    async def forget_kv(self, parcel: KvParcel) -> None:
        self.kv.forget(parcel)

    # How it goes about it.

    def _check(self, target: Pipeline) -> RefactorCheck:
        return check_target(
            target, current=self._pipeline, capabilities=self._capabilities, resident_ranks=self._resident_ranks
        )

    def _commit(self, target: Pipeline) -> None:
        self._pipeline = target
        self._epoch += 1

    def _report(self, phase: HandoverPhase) -> RefactorProgress:
        return RefactorProgress(
            phase=phase,
            message=f"fake {phase.value}",
            elapsed_s=0.0,
            epoch=self._epoch,
            requests_live=self._batch.num_live,
        )

    def _tell_end(self, end: EngineError) -> None:
        for sequence, outbox in self._outboxes.items():
            self._batch.remove(sequence)
            outbox.put_nowait(type(end)(str(end)))
        self._handovers.release()
        self._wake()

    def _wake(self) -> None:
        busy = self._batch.num_live > 0
        (self._idle.clear if busy else self._idle.set)()
        (self._may_step.set if busy and not self._held else self._may_step.clear)()

    async def _run(self) -> None:
        while self._life.end is None:
            await self._may_step.wait()
            await self._sleep(self._step_s)
            if not self._held:
                for sequence, chunk in self._batch.step():
                    self._outboxes[sequence].put_nowait(chunk)
                self._wake()


def status_of(index: int, stage: Stage, *, busy: float | None) -> StageStatus:
    return StageStatus(
        index=index,
        device_ids=stage.device_ids,
        first_decoder=stage.first_decoder,
        end_decoder=stage.end_decoder,
        pids=(),
        weights_bytes=stage.num_decoders * _DECODER_BYTES,
        kv_mapped_bytes=0,
        busy=busy,
    )
