"""The daemon's side of the native engine: starts the core process and speaks with it. No torch here."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar, assert_never

from engines import errors
from engines.errors import EngineClosed, EngineDied, EngineError, EngineStartFailed, InvalidRequest, UnsupportedByEngine
from engines.frames import read_frame, write_frame
from engines.launching import CoreProcess, launch_apart, launch_bound
from engines.native import client_messages as c
from engines.native.adopting import AdoptedCore
from engines.native.options import NativeOptions
from engines.native.shaping import ENGINE_PARAMS, shaping_of
from engines.outliving import Outliving
from engines.protocol import (
    EngineCapabilities,
    EngineCounters,
    FinishReason,
    GenerationRequest,
    RefactorCheck,
    RefactorProgress,
    ScoredToken,
    StageStatus,
    TokenChunk,
    TopLogprobs,
)
from engines.validation import check_request
from planner.layout import Pipeline

CORE = "engines.native.core"
_EXIT_GRACE_S = 5.0
_DRAIN_POLL_S = 0.02
T = TypeVar("T")


class _Stream:
    """What has arrived for one request and was not taken yet."""

    __slots__ = ("cached", "error", "finish", "logprobs", "prompt", "tokens", "tops", "waiter")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[TopLogprobs] = []
        self.prompt: tuple[ScoredToken, ...] = ()
        self.cached: int | None = None
        self.finish: FinishReason | None = None
        self.error: EngineError | None = None
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    @property
    def has_news(self) -> bool:
        return bool(self.tokens) or self.finish is not None or self.error is not None

    def detail(self, details: c.Details) -> None:
        """Take in what was asked for besides the token that arrived last."""
        if details.top:
            self.tops.append(details.top)
        if details.prompt:
            self.prompt = details.prompt
        if details.cached is not None:
            self.cached = details.cached

    def take(self) -> TokenChunk:
        """Return what has arrived, once."""
        chunk = TokenChunk(
            token_ids=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish,
            top_logprobs=tuple(self.tops),
            prompt_logprobs=self.prompt,
            cached_tokens=self.cached,
        )
        self.tokens, self.logprobs, self.tops, self.prompt, self.cached = [], [], [], (), None
        return chunk


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
        self._capabilities: EngineCapabilities | None = None
        self._process: CoreProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._streams: dict[int, _Stream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._refactorings: dict[int, asyncio.Queue[RefactorProgress | c.Refactored]] = {}
        self._targets: dict[int, Pipeline] = {}
        self._last_key = 0
        self._end: EngineError | None = EngineClosed("the engine has not been started")
        self._death: asyncio.Future[str] | None = None
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
        assert self._process is not None
        return self._process.pid

    async def start(self, *, on_progress: Callable[[str], None]) -> None:
        self._on_progress = on_progress
        self._death = asyncio.get_running_loop().create_future()
        if self._adopted is not None:
            self._adopt(self._adopted)
            return
        ready = self._expect(0)
        self._process, reader = await self._launch()
        self._reading = asyncio.create_task(self._read(self._process, reader), name="native-engine-reader")
        self._send(c.StartCore(options=self._options, pipeline=self._pipeline, epoch=self._epoch))
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
            await self._leave_record(self._outliving, self._process.pid)

    @property
    def is_adopted(self) -> bool:
        """Whether its processes were there before it."""
        return self._adopted is not None

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        self._ensure_alive()
        check_request(request, self.capabilities)
        shaping = shaping_of(request.sampling, vocab_size=self.capabilities.vocab_size)
        self._last_key += 1
        key, stream = self._last_key, _Stream()
        self._streams[key] = stream
        self._send(
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
                if not stream.has_news:
                    stream.waiter = asyncio.get_running_loop().create_future()
                    await stream.waiter
                chunk = stream.take()
                if chunk.token_ids or chunk.finish_reason is not None:
                    yield chunk
                if chunk.finish_reason is not None:
                    return
                if stream.error is not None and not stream.tokens:
                    raise stream.error
        finally:
            del self._streams[key]
            if stream.finish is None and self._end is None:
                self._send(c.Abort(key=key))

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
        self._ensure_alive()
        call = self._next_call()
        queue: asyncio.Queue[RefactorProgress | c.Refactored] = asyncio.Queue()
        self._refactorings[call], self._targets[call] = queue, target
        self._send(c.Refactor(call=call, target=target))
        while isinstance(item := await queue.get(), RefactorProgress):
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

    async def load_adapter(self, name: str, directory: str) -> None:
        await self._change_adapters(lambda call: c.LoadAdapter(call=call, name=name, directory=directory))
        self._have_adapters(self._adapters | {name: directory})

    async def announce_unload(self, name: str) -> None:
        await self._change_adapters(lambda call: c.UnloadAdapter(call=call, name=name, when_adopted=True))

    async def unload_adapter(self, name: str) -> None:
        await self._change_adapters(lambda call: c.UnloadAdapter(call=call, name=name))
        self._have_adapters({known: where for known, where in self._adapters.items() if known != name})

    async def _change_adapters(self, build: Callable[[int], c.ClientCommand]) -> None:
        reply: c.AdapterChanged = await self._call(build)
        if reply.error:
            raise getattr(errors, reply.error)(reply.message)

    def _have_adapters(self, adapters: dict[str, str]) -> None:
        self._adapters = adapters
        self._capabilities = replace(self.capabilities, adapters=tuple(adapters))

    async def drain(self) -> None:
        while True:
            counters = await self.counters()
            if counters.running + counters.waiting == 0 and not self._streams:
                return
            await asyncio.sleep(_DRAIN_POLL_S)

    async def died(self) -> str:
        assert self._death is not None, "the engine has not been started"
        return await asyncio.shield(self._death)

    async def close(self) -> None:
        """End all processes, or leave them to the next daemon where that is how they live. Idempotent."""
        stays = self._end is None and self._outliving is not None and self._outliving.is_leaving
        if self._end is None or not isinstance(self._end, EngineClosed):
            self._finish(EngineClosed("the engine was closed"))
        process, self._process = self._process, None
        if process is None:
            return
        if not stays:
            await self._end_process(process)
        if self._reading is not None:
            self._reading.cancel()
            with suppress(asyncio.CancelledError):
                await self._reading
        if self._writer is not None:
            self._writer.close()
            with suppress(ConnectionError):
                await self._writer.wait_closed()
        process.let_go()

    async def _end_process(self, process: CoreProcess) -> None:
        with suppress(ConnectionError):
            self._send(c.Shutdown())
        try:
            await asyncio.wait_for(process.ended(), _EXIT_GRACE_S)
        except TimeoutError:
            process.kill()
            await process.ended()
        if self._outliving is not None:
            self._outliving.forget()

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
        self._send(c.ArmCore(worker=worker, name=name, action=action))

    # --- inside ---

    async def _launch(self) -> tuple[CoreProcess, asyncio.StreamReader]:
        if self._outliving is None:
            process, connection = await launch_bound(self._options.python, CORE)
        else:
            try:
                process, connection = await launch_apart(self._options.python, self._outliving.place, CORE)
            except EngineStartFailed:
                self._outliving.forget()
                raise
        reader, self._writer = await asyncio.open_connection(sock=connection)
        self._end = None
        return process, reader

    async def _leave_record(self, outliving: Outliving, pid: int) -> None:
        """Note the engine for the next daemon; only now may it outlive this one."""
        try:
            outliving.note(pid)
        except OSError as error:
            await self.close()
            raise EngineStartFailed(f"{outliving.record}: {error.strerror or error}") from error
        self._send(c.Outlive(adopt_within_s=outliving.adopt_within_s))

    def _adopt(self, adopted: AdoptedCore) -> None:
        """Begin where the daemon before this one has left: the layout in force is what the engine says."""
        self._process, self._writer, self._end = adopted.process, adopted.writer, None
        self._pipeline, self._epoch = adopted.report.pipeline, adopted.report.epoch
        self._adapters = adopted.report.adapters
        self._reading = asyncio.create_task(self._read(adopted.process, adopted.reader), name="native-engine-reader")
        self._become_ready(adopted.report.ready)
        self._send(c.Outlive(adopt_within_s=adopted.outliving.adopt_within_s))

    def _become_ready(self, ready: c.Ready) -> None:
        self._capabilities = EngineCapabilities(
            name="native",
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            eos_token_ids=ready.eos_token_ids,
            refactors_in_place=True,
            max_stages=min(len(self._options.device_ids), self._pipeline.num_decoders),
            tensor_parallel=False,
            kv_range=ready.kv_range,
            engine_params=ENGINE_PARAMS,
            grammars=ready.grammars,
            top_logprobs=True,
            adapters=tuple(self.adapter_directories),
            changes_adapters=True,
            caches_prefixes=self._options.prefix_caching,
        )
        self.attention = ready.attention
        self.worker_pids = ready.worker_pids

    async def _read(self, process: CoreProcess, reader: asyncio.StreamReader) -> None:
        while (raw := await read_frame(reader)) is not None:
            self._handle(c.decode_report(raw))
        how = await process.ended()
        self._finish(EngineDied(self._last_words or f"the engine core {how}"))

    def _handle(self, report: c.CoreReport) -> None:
        match report:
            case c.Outputs():
                self._deliver(report)
            case c.Refused():
                self._refuse(report)
            case c.Progress():
                self._note_progress(report)
            case c.Refactored():
                self._targets.pop(report.call, None)
                self._refactorings.pop(report.call).put_nowait(report)
            case c.Starting():
                self._on_progress(report.message)
            case c.KvRangeChanged():
                self._capabilities = replace(self.capabilities, kv_range=report.kv_range)
            case c.Ready() | c.StartFailed():
                self._settle(0, report)
            case (
                c.Checked()
                | c.KvResized()
                | c.AdapterChanged()
                | c.Cancelled()
                | c.Counters()
                | c.Stages()
                | c.Trace()
                | c.StageSteps()
            ):
                self._settle(report.call, report)
            case c.Fatal():
                self._last_words = report.reason
            case c.Adopted():
                raise AssertionError("answered before there was a reader")
            case _:
                assert_never(report)

    def _deliver(self, outputs: c.Outputs) -> None:
        for index, (key, token, finish, logprob) in enumerate(
            zip(outputs.keys, outputs.tokens, outputs.finishes, outputs.logprobs, strict=True)
        ):
            stream = self._streams.get(key)
            if stream is None:  # aborted meanwhile
                continue
            if token >= 0:
                stream.tokens.append(token)
            if logprob is not None:
                stream.logprobs.append(logprob)
            if index in outputs.details:
                stream.detail(outputs.details[index])
            if finish:
                stream.finish = FinishReason(finish)
            stream.wake()

    def _refuse(self, refused: c.Refused) -> None:
        stream = self._streams.get(refused.key)
        if stream is not None:
            stream.error = InvalidRequest(refused.message, parameter=refused.parameter, code=refused.code)
            stream.wake()

    def _note_progress(self, report: c.Progress) -> None:
        progress = report.progress
        if progress.epoch is not None and progress.epoch > self._epoch:
            self._epoch = progress.epoch
            self._pipeline = self._targets[report.call]
        self._refactorings[report.call].put_nowait(progress)

    def _finish(self, end: EngineError) -> None:
        """Nothing more will come: everybody who waits learns why."""
        self._end = end
        for stream in self._streams.values():
            stream.error = end
            stream.wake()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(end)
        self._calls.clear()
        for call, queue in self._refactorings.items():
            queue.put_nowait(c.Refactored(call=call, error=type(end).__name__, message=str(end)))
        self._refactorings.clear()
        if self._death is not None and not self._death.done() and isinstance(end, EngineDied):
            self._death.set_result(str(end))

    def _next_call(self) -> int:
        self._last_key += 1
        return self._last_key

    def _expect(self, call: int) -> "asyncio.Future[Any]":
        self._calls[call] = asyncio.get_running_loop().create_future()
        return self._calls[call]

    def _settle(self, call: int, reply: object) -> None:
        future = self._calls.pop(call, None)
        if future is not None and not future.done():
            future.set_result(reply)

    async def _call(self, build: Callable[[int], c.ClientCommand]) -> Any:
        self._ensure_alive()
        call = self._next_call()
        answer = self._expect(call)
        self._send(build(call))
        return await answer

    def _ensure_alive(self) -> None:
        if self._end is not None:
            raise type(self._end)(str(self._end))

    def _send(self, command: c.ClientCommand) -> None:
        if self._writer is not None and not self._writer.is_closing():  # a core that was killed is noticed later
            write_frame(self._writer, c.encode(command))
