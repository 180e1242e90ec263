"""The daemon's side of the native engine: the ``Engine`` that a core process is. No torch here."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, assert_never

from engines import errors
from engines.draining import until_drained
from engines.errors import EngineDied, EngineError, EngineStartFailed, UnsupportedByEngine
from engines.life import Life
from engines.native import client_messages as c
from engines.native.adopting import AdoptedCore
from engines.native.calls import Calls
from engines.native.capabilities import capabilities_of
from engines.native.core_link import CoreLink
from engines.native.options import NativeOptions
from engines.native.shaping import shaping_of
from engines.native.streams import Streams
from engines.outliving import Outliving
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
from planner.layout import Pipeline

_DRAIN_POLL_S = 0.02


class NativeEngine:
    """An ``Engine`` made of a core process and one stage worker process per device."""

    def __init__(
        self,
        options: NativeOptions,
        pipeline: Pipeline,
        *,
        epoch: int = 0,
        outliving: Outliving | AdoptedCore | None = None,
    ) -> None:
        """``outliving``: how it may outlive this process, or the core that has; None: it ends with it."""
        self._options = options
        self._pipeline = pipeline
        self._epoch = epoch
        self._adopted = outliving if isinstance(outliving, AdoptedCore) else None
        self._outliving = outliving.outliving if isinstance(outliving, AdoptedCore) else outliving
        self._adapters = dict(options.adapters)  # name and directory of each
        self._adapter_bytes = 0  # of those that came while it served
        self._capabilities: EngineCapabilities | None = None
        self._link = CoreLink(options.python, self._outliving, on_report=self._handle, on_end=self._ended)
        self._streams = Streams()
        self._calls = Calls()
        self._life = Life(on_end=self._tell_end)
        self._last_words = ""
        self._on_progress: Callable[[str], None] = lambda _message: None
        self.attention = ""
        self.worker_pids: tuple[int, ...] = ()
        self.longest_slice_s = 0.0  # as of the last call of stages()

    # --- the protocol ---

    @property
    def capabilities(self) -> EngineCapabilities:
        assert self._capabilities is not None, "valid once start has returned"
        return self._capabilities

    @property
    def pipeline(self) -> Pipeline:
        return self._pipeline

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def core_pid(self) -> int:
        """The engine core's process id."""
        return self._link.pid

    async def start(self, *, on_progress: Callable[[str], None]) -> None:
        self._on_progress = on_progress
        if self._adopted is not None:
            self._adopt(self._adopted)
            return
        ready = self._calls.expect(0)
        await self._link.launch()
        self._life.begin()
        self._link.send(c.StartCore(options=self._options, pipeline=self._pipeline, epoch=self._epoch))
        try:
            report = await ready
        except EngineDied as error:
            said = "" if self._outliving is None else self._outliving.last_words()
            await self.close()
            raise EngineStartFailed(f"{error}: {said}" if said else str(error)) from error
        if isinstance(report, c.StartFailed):
            await self.close()
            raise (UnsupportedByEngine if report.unsupported else EngineStartFailed)(report.reason)
        self._become_ready(report)
        if self._outliving is not None:
            await self._leave_record(self._outliving)

    @property
    def is_adopted(self) -> bool:
        """Whether its processes were there before it."""
        return self._adopted is not None

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        self._life.ensure()
        check_request(request, self.capabilities)
        shaping = shaping_of(request.sampling, vocab_size=self.capabilities.vocab_size)
        key = self._calls.next_number()
        stream = self._streams.open(key)
        self._link.send(
            c.Submit(
                key=key,
                prompt=list(request.prompt_token_ids),
                generated=list(request.generated_token_ids),
                sampling=request.sampling,
                shaping=shaping,
            )
        )
        try:
            while True:
                chunk = await stream.take()
                if chunk.token_ids or chunk.finish_reason is not None:
                    yield chunk
                if chunk.finish_reason is not None:
                    return
                if stream.error is not None and not stream.tokens:
                    raise stream.error
        finally:
            self._streams.close(key)
            if stream.finish is None and self._life.end is None:
                self._link.send(c.Abort(key=key))

    async def counters(self) -> EngineCounters:
        reply: c.Counters = await self._call(lambda call: c.ReadCounters(call=call))
        return reply.counters

    async def stages(self) -> tuple[StageStatus, ...]:
        reply: c.Stages = await self._call(lambda call: c.ReadStages(call=call))
        self.worker_pids = reply.worker_pids
        self.longest_slice_s = reply.longest_slice_s
        return reply.stages

    async def check_refactor(self, target: Pipeline) -> RefactorCheck:
        reply: c.Checked = await self._call(lambda call: c.CheckRefactor(call=call, target=target))
        return reply.check

    async def refactor(self, target: Pipeline) -> AsyncIterator[RefactorProgress]:
        self._life.ensure()
        call = self._calls.next_number()
        reports = self._calls.refactoring(call, target)
        self._link.send(c.Refactor(call=call, target=target))
        while isinstance(item := await reports.get(), RefactorProgress):
            yield item
        if item.error:
            raise getattr(errors, item.error)(item.message)

    async def cancel_refactor(self) -> bool:
        reply: c.Cancelled = await self._call(lambda call: c.CancelRefactor(call=call))
        return reply.accepted

    async def resize_kv(self, blocks: int) -> int:
        reply: c.KvResized = await self._call(lambda call: c.ResizeKv(call=call, blocks=blocks))
        if reply.error:
            raise getattr(errors, reply.error)(reply.message)
        return reply.returned_bytes

    @property
    def adapter_directories(self) -> Mapping[str, str]:
        return self._adapters

    @property
    def adapter_bytes(self) -> int:
        return self._adapter_bytes if self._life.end is None else 0

    async def load_adapter(self, name: str, directory: str) -> None:
        await self._change_adapters(lambda call: c.LoadAdapter(call=call, name=name, directory=directory))

    async def announce_unload(self, name: str) -> None:
        await self._change_adapters(lambda call: c.UnloadAdapter(call=call, name=name, when_adopted=True))

    async def unload_adapter(self, name: str) -> None:
        await self._change_adapters(lambda call: c.UnloadAdapter(call=call, name=name))

    async def _change_adapters(self, build: Callable[[int], c.ClientCommand]) -> None:
        reply: c.AdapterChanged = await self._call(build)
        if reply.error:
            raise getattr(errors, reply.error)(reply.message)

    def _note_adapters(self, report: c.AdapterChanged) -> None:
        """Have what the core has now, also when nobody waits for the change any more."""
        self._adapters, self._adapter_bytes = report.adapters, report.adapter_bytes
        self._capabilities = replace(self.capabilities, adapters=tuple(report.adapters))
        self._calls.settle(report.call, report)

    async def drain(self) -> None:
        await until_drained(self.counters, has_streams=lambda: bool(self._streams), poll_s=_DRAIN_POLL_S)

    async def died(self) -> str:
        return await self._life.died()

    async def close(self) -> None:
        """End all processes, or leave them to the next daemon where that is how they live. Idempotent."""
        stays = self._life.end is None and self._outliving is not None and self._outliving.is_leaving
        self._life.close()
        await self._link.close(stays=stays, at_once=self._capabilities is None)

    # --- beyond the protocol: for benchmarks and tests ---

    async def trace(self) -> c.Trace:
        """Return when steps ended since the last call, by the core's clock."""
        reply: c.Trace = await self._call(lambda call: c.ReadTrace(call=call))
        return reply

    async def stage_steps(self) -> c.StageSteps:
        """Return what each stage computed in its last steps since the last call, and for how long."""
        reply: c.StageSteps = await self._call(lambda call: c.ReadSteps(call=call))
        return reply

    def arm_failpoint(self, name: str, action: str, *, worker: int = -1) -> None:
        """Arm a failpoint in the core, or in one worker; an empty name disarms all."""
        self._link.send(c.ArmCore(worker=worker, name=name, action=action))

    # --- inside ---

    async def _leave_record(self, outliving: Outliving) -> None:
        """Note the engine for the next daemon; only now may it outlive this one."""
        try:
            outliving.note(self._link.pid)
        except OSError as error:
            await self.close()
            raise EngineStartFailed(f"{outliving.record}: {error.strerror or error}") from error
        self._link.send(c.Outlive(adopt_within_s=outliving.adopt_within_s))

    def _adopt(self, adopted: AdoptedCore) -> None:
        """Begin where the daemon before this one has left: the layout in force is what the engine says."""
        self._life.begin()
        self._pipeline, self._epoch = adopted.report.pipeline, adopted.report.epoch
        self._adapters, self._adapter_bytes = adopted.report.adapters, adopted.report.adapter_bytes
        self._link.adopt(adopted)
        self._become_ready(adopted.report.ready)
        self._link.send(c.Outlive(adopt_within_s=adopted.outliving.adopt_within_s))

    def _become_ready(self, ready: c.Ready) -> None:
        self._capabilities = capabilities_of(
            ready, self._options, num_decoders=self._pipeline.num_decoders, adapters=tuple(self._adapters)
        )
        self.attention = ready.attention
        self.worker_pids = ready.worker_pids

    def _ended(self, how: str) -> None:
        if self._life.end is None:  # else that is how it was closed
            self._life.die(self._last_words or f"the engine core {how}")

    def _handle(self, report: c.CoreReport) -> None:
        match report:
            case c.Outputs():
                self._streams.deliver(report)
            case c.Refused():
                self._streams.refuse(report)
            case c.Progress():
                self._note_progress(report)
            case c.Refactored():
                self._calls.refactored(report)
            case c.Starting():
                self._on_progress(report.message)
            case c.KvRangeChanged():
                self._capabilities = replace(self.capabilities, kv_range=report.kv_range)
            case c.Ready() | c.StartFailed():
                self._calls.settle(0, report)
            case c.Checked() | c.KvResized() | c.Cancelled() | c.Counters() | c.Stages() | c.Trace() | c.StageSteps():
                self._calls.settle(report.call, report)
            case c.AdapterChanged():
                self._note_adapters(report)
            case c.Fatal():
                self._last_words = report.reason
            case c.Adopted():
                raise AssertionError("answered before there was a reader")
            case _:
                assert_never(report)

    def _note_progress(self, report: c.Progress) -> None:
        progress, target = report.progress, self._calls.progress(report)
        if progress.epoch is not None and progress.epoch > self._epoch:
            self._epoch = progress.epoch
            self._pipeline = target

    def _tell_end(self, end: EngineError) -> None:
        """Nothing more will come: everybody who waits learns why."""
        self._streams.end(end)
        self._calls.end(end)

    async def _call(self, build: Callable[[int], c.ClientCommand]) -> Any:
        self._life.ensure()
        call = self._calls.next_number()
        answer = self._calls.expect(call)
        self._link.send(build(call))
        return await answer
