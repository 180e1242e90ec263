"""The daemon's side of vLLM: starts it as a supervised child, feeds it requests, notices when it dies or hangs."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

from engines.errors import EngineClosed, EngineDied, EngineError, EngineStartFailed, InvalidRequest, UnsupportedByEngine
from engines.protocol import (
    EngineCapabilities,
    EngineCounters,
    FinishReason,
    GenerationRequest,
    KvParcel,
    RefactorCheck,
    RefactorProgress,
    StageStatus,
    TokenChunk,
)
from engines.validation import check_request
from engines.vllm.boot import connect_workers, first_contact, launch
from engines.vllm.channel import CallFailed, Channel, ChannelClosed, Message
from engines.vllm.command import HTTP_SOCKET
from engines.vllm.freed import Departed
from engines.vllm.handovers import VllmHandovers
from engines.vllm.hang import Pulse
from engines.vllm.interpreter import vllm_version
from engines.vllm.kv_parcels import VllmKvParcels
from engines.vllm.logs import LogLine, progress_of, takes_long
from engines.vllm.options import VllmOptions
from engines.vllm.own_server import own_server
from engines.vllm.ranks import Ranks, boot_counts
from engines.vllm.recompile import Recompilation
from engines.vllm.sampling import to_vllm, tokens_left
from engines.vllm.server import VllmServer
from engines.vllm.status import StageReader
from engines.vllm.streams import Stream
from planner.layout import Pipeline
from planner.model_graph import ModelGraph

_DRAIN_POLL_S: Final = 0.05
_PULSE_S: Final = 1.0
_FREE_DEADLINE_S: Final = 30.0
_DEPARTED: Final = Departed()  # of this daemon, whose restarts and second instances share devices
_STARTS: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock]] = WeakKeyDictionary()


def _ignore(_news: object) -> None:
    pass


class VllmEngine:
    """An ``Engine`` that is a vLLM of its own environment.

    vLLM boots with a decoder on each rank at least: where ``pipeline`` has less, ``pipeline`` is the nearest it could
    boot with once ``start`` has returned, and the epoch has moved on with it.

    Args:
        graph: The model, for the memory of a refactoring; without it none is done.
        on_log: Told each line that vLLM writes.
        on_recompiled: Told after a move in compiled mode how the return to compiled code ended.
    """

    def __init__(
        self,
        options: VllmOptions,
        pipeline: Pipeline,
        *,
        epoch: int = 0,
        graph: ModelGraph | None = None,
        on_log: Callable[[LogLine], None] = _ignore,
        on_recompiled: Callable[[Recompilation], None] = _ignore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._ranks = Ranks(device_ids=options.device_ids, tensor_parallel=options.tensor_parallel)
        self._pipeline = pipeline
        self._epoch = epoch
        self._graph = graph
        self._on_log = on_log
        self.on_recompiled = on_recompiled
        self._clock = clock
        self._on_progress: Callable[[str], None] = lambda _message: None
        self._capabilities: EngineCapabilities | None = None
        self._server: VllmServer | None = None
        self._channel: Channel | None = None
        self._sides: dict[int, Channel] = {}
        self._handovers: VllmHandovers | None = None
        self._stage_reader = StageReader(ranks=self._ranks, clock=clock)
        self._streams: dict[int, Stream] = {}
        self._key_of: dict[str, int] = {}  # of requests that run, by their id
        self._parcels: VllmKvParcels | None = None
        self._last_key = 0
        self._end: EngineError | None = EngineClosed("the engine has not been started")
        self._death: asyncio.Future[str] | None = None
        self._pulse = Pulse(deadline_s=options.hang_deadline_s, patience_s=options.start_deadline_s)
        self._watching: asyncio.Task[None] | None = None
        self._last_progress = ""
        self.info: Message = {}  # what vLLM said of itself when it was ready

    # --- the protocol ---

    @property
    def capabilities(self) -> EngineCapabilities:
        assert self._capabilities is not None, "valid once start has returned"
        return self._capabilities

    @property
    def pipeline(self) -> Pipeline:
        return self._pipeline if self._handovers is None else self._handovers.pipeline

    @property
    def epoch(self) -> int:
        return self._epoch if self._handovers is None else self._handovers.epoch

    async def start(self, *, on_progress: Callable[[str], None]) -> None:
        self._on_progress = on_progress
        self._death = asyncio.get_running_loop().create_future()
        try:
            await self._start()
        except EngineError as error:
            await self.close()
            if isinstance(error, EngineStartFailed | UnsupportedByEngine):
                raise
            raise EngineStartFailed(str(error)) from error
        except BaseException:
            await self.close()
            raise

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        self._ensure_alive()
        check_request(request, self.capabilities)
        left = tokens_left(request, self.capabilities)
        if left <= 0:
            yield TokenChunk(token_ids=(), finish_reason=FinishReason.LENGTH)
            return
        sampling = to_vllm(request, max_tokens=left)
        self._last_key += 1
        key, stream = self._last_key, Stream()
        self._streams[key] = stream
        self._key_of[request.request_id] = key
        prompt = [*request.prompt_token_ids, *request.generated_token_ids]
        self._send({"op": "generate", "key": key, "prompt": prompt, "sampling": sampling})
        try:
            async for chunk in stream:
                yield chunk
        finally:
            del self._streams[key]
            if self._key_of.get(request.request_id) == key:
                del self._key_of[request.request_id]
            if not stream.ended and self._end is None:
                self._send({"op": "abort", "key": key})

    async def counters(self) -> EngineCounters:
        reply = await self._core("counters")
        refactorings = 0 if self._handovers is None else self._handovers.refactorings_total
        # vLLM's workers live and die with it
        return EngineCounters(**reply, worker_restarts_total=0, refactorings_total=refactorings)

    async def stages(self) -> tuple[StageStatus, ...]:
        self._ensure_alive()
        try:
            return await self._stage_reader.read(self.pipeline, self._sides)
        except ChannelClosed:
            await self._raise_end()
            raise

    async def check_refactor(self, target: Pipeline) -> RefactorCheck:
        return await self._ready_handovers().check(target)

    async def refactor(self, target: Pipeline) -> AsyncIterator[RefactorProgress]:
        async for report in self._ready_handovers().refactor(target):
            yield report

    async def cancel_refactor(self) -> bool:
        return await self._ready_handovers().cancel()

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
        if not isinstance(self._end, EngineClosed):
            self._finish(EngineClosed("the engine was closed"))
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        for channel in [*self._sides.values(), *([self._channel] if self._channel else [])]:
            await channel.close()
        if self._server is not None:
            await self._server.close()
            _DEPARTED.note(self._options.device_ids, self._server.processes)

    # --- OwnRoutes ---

    @property
    def own_routes_socket(self) -> Path:
        return self.run_directory / HTTP_SOCKET

    # --- KvTransfers ---

    async def export_kv(self, request_id: str) -> KvParcel:
        return await self._ready_parcels().export(request_id)

    async def accept_kv(self, parcel: KvParcel) -> None:
        await self._ready_parcels().accept(parcel)

    async def forget_kv(self, parcel: KvParcel) -> None:
        if self._parcels is not None:
            await self._parcels.forget(parcel)

    # --- beyond the protocol: for benchmarks and tests ---

    @property
    def options(self) -> VllmOptions:
        return self._options

    @property
    def pids(self) -> dict[str, Any]:
        """Process ids: ``api``, ``core``, ``workers`` and ``helpers`` in rank order."""
        return dict(self.info["pids"])

    @property
    def run_directory(self) -> Path:
        """Where the sockets are."""
        assert self._server is not None
        return self._server.run_directory

    async def trace(self) -> Message:
        """Return when steps ended and began since the last call, by the core's clock."""
        reply: Message = await self._core("trace")
        return reply

    async def recompiled(self) -> None:
        """Return when no return to compiled code is under way."""
        await self._ready_handovers().recompiler.wait()

    async def rank_status(self, rank: int) -> Message:
        """Return what one rank says of itself."""
        status: Message = await self._sides[rank].call("status")
        return status

    async def arm_failpoint(self, name: str, action: str, *, rank: int | None = None) -> None:
        """Arm a failpoint in the engine core, or in the worker of one rank; an empty name disarms all there."""
        assert self._channel is not None
        if rank is None:
            await self._channel.core("arm", name, action)
        else:
            await self._sides[rank].call("arm", name=name, action=action)

    # --- starting ---

    async def _start(self) -> None:
        options = self._options
        version = await vllm_version(options.python)
        self._on_progress(f"vLLM {version}: waiting for its turn to start")
        counts = self._boot_layout()
        lock = _STARTS.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with lock:  # two that load at once would each measure the other's memory
            await _DEPARTED.ensure_free(options.device_ids, deadline_s=_FREE_DEADLINE_S)
            self._server = VllmServer(on_log=self._note_log, on_death=self._note_death)
            self._end = None
            self._on_progress(f"starting vLLM {version}")
            await launch(self._server, options, counts=counts)
            try:
                async with asyncio.timeout(options.start_deadline_s):
                    await self._become_ready(self._server)
            except TimeoutError:
                words = self._server.with_last_words(f"vLLM was not ready within {options.start_deadline_s:g} s")
                raise EngineStartFailed(words) from None
        self._watching = asyncio.create_task(self._watch(), name="vllm-pulse")

    def _boot_layout(self) -> tuple[int, ...]:
        if (refusal := self._ranks.refusal_of(self._pipeline)) is not None:
            raise UnsupportedByEngine(refusal)
        counts = self._ranks.counts_of(self._pipeline)
        try:
            boot = boot_counts(counts)
        except ValueError as error:
            raise UnsupportedByEngine(str(error)) from None
        if boot != counts:
            self._pipeline = self._ranks.pipeline_of(boot)
            self._epoch += 1
        return boot

    async def _become_ready(self, server: VllmServer) -> None:
        assert self._death is not None
        contact = asyncio.create_task(first_contact(server.run_directory, on_message=self._handle))
        try:
            awaited: list[asyncio.Future[Any]] = [contact, self._death]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            self._ensure_alive()
            self._channel, self.info = await contact
        except ChannelClosed as error:
            raise EngineStartFailed(server.with_last_words(str(error))) from error
        finally:
            contact.cancel()
            await asyncio.gather(contact, return_exceptions=True)
        pids = self.info["pids"]
        processes = [(pids["core"], "vLLM's engine core")]
        processes += [(pid, f"vLLM's worker of rank {rank}") for rank, pid in enumerate(pids["workers"])]
        server.watch(processes)
        self._sides = await connect_workers(server.run_directory, count=len(pids["workers"]))
        self._ensure_alive()
        self._adopt(self._channel, self.info)

    def _adopt(self, channel: Channel, info: Message) -> None:
        """Take over an engine that is ready."""
        self._handovers = VllmHandovers(
            self._options,
            self._graph,
            channel,
            self._sides,
            pipeline=self._pipeline,
            epoch=self._epoch,
            refusal=info["refactor_refusal"],
            requests_live=lambda: len(self._streams),
            on_crash=self._note_death,
            on_recompiled=self.on_recompiled,
        )
        self._parcels = VllmKvParcels(channel, run_directory=self.run_directory, name_of=self._name_in_core)
        self._capabilities = EngineCapabilities(
            name="vllm",
            max_model_len=info["max_model_len"],
            vocab_size=info["vocab_size"],
            eos_token_ids=tuple(info["eos_token_ids"]),
            refactors_in_place=not info["refactor_refusal"] and self._graph is not None,
            max_stages=self._ranks.count,
            tensor_parallel=True,
            resumes_seeded=False,
            takes_engine_params=True,
            own_server=own_server(self._options.args),
            kv_form=info.get("kv_form", ""),
            kv_refusal=info.get("kv_refusal", ""),
            resident=tuple(self._ranks.devices_of(rank) for rank in range(self._ranks.count)),
        )

    # --- what comes from vLLM ---

    def _handle(self, message: Message) -> None:
        match message["op"]:
            case "outputs":
                self._pulse = self._pulse.progressed(now_s=self._clock())
                for key, tokens, finish, logprobs in message["items"]:
                    if (stream := self._streams.get(key)) is not None:  # else aborted meanwhile
                        stream.add(tokens, logprobs or (), FinishReason(finish) if finish else None)
            case "failed":
                if (stream := self._streams.get(message["key"])) is not None:
                    stream.fail(InvalidRequest(message["message"], parameter=message["parameter"] or "prompt"))
            case "dead":
                self._note_death(f"vLLM's engine core has died: {message['reason']}")
            case _:
                pass

    def _note_log(self, line: LogLine) -> None:
        self._on_log(line)
        progress = progress_of(line)
        if progress is None:
            return
        if self._capabilities is None and progress != self._last_progress:
            self._last_progress = progress
            self._on_progress(f"vLLM: {progress}")
        if takes_long(progress):
            self._pulse = self._pulse.working_slowly(now_s=self._clock())

    def _note_death(self, reason: str) -> None:
        if self._server is not None and self._end is None:
            self._finish(EngineDied(self._server.with_last_words(reason)))
            self._server.kill()

    async def _watch(self) -> None:
        """About once a second: is there work, and does it go on? A look that is not answered is work, too."""
        while self._end is None:
            looking = asyncio.create_task(self._steps_total())
            try:
                await self._look(looking)
            finally:
                looking.cancel()
            await asyncio.sleep(_PULSE_S)

    async def _look(self, looking: "asyncio.Task[int | None]") -> None:
        """Wait for one look, and meanwhile for a hang."""
        while not looking.done() and self._end is None:
            await asyncio.wait([looking], timeout=min(_PULSE_S, self._options.hang_deadline_s / 2))
            now_s, steps = self._clock(), looking.result() if looking.done() else None
            pending = bool(self._streams) or not looking.done()
            self._pulse = self._pulse.seen(pending=pending, steps_total=steps, now_s=now_s)
            if (verdict := self._pulse.verdict(now_s=now_s)) is not None:
                self._note_death(f"vLLM is {verdict}")

    async def _steps_total(self) -> int | None:
        try:
            return (await self.counters()).steps_total
        except EngineError:
            return None  # it has ended

    # --- inside ---

    def _finish(self, end: EngineError) -> None:
        """Nothing more will come: everybody who waits learns why."""
        self._end = end
        for stream in self._streams.values():
            stream.fail(end)
        if self._handovers is not None:
            self._handovers.end(end)
        if self._death is not None and not self._death.done() and isinstance(end, EngineDied):
            self._death.set_result(str(end))

    async def _core(self, method: str) -> Any:
        self._ensure_alive()
        assert self._channel is not None
        try:
            return await self._channel.core(method)
        except ChannelClosed:
            await self._raise_end()
            raise
        except CallFailed as error:
            self._ensure_alive()
            raise EngineError(f"vLLM's engine core refused {method}: {error}") from error

    async def _raise_end(self) -> None:
        """The channel is gone, so the API server is or soon will be: raise what it ended of."""
        assert self._server is not None
        if self._end is None:
            self._note_death("vLLM's API server closed the token channel")
        self._ensure_alive()

    def _ready_handovers(self) -> VllmHandovers:
        self._ensure_alive()
        assert self._handovers is not None, "valid once start has returned"
        return self._handovers

    def _ready_parcels(self) -> VllmKvParcels:
        self._ensure_alive()
        assert self._parcels is not None, "valid once start has returned"
        return self._parcels

    def _name_in_core(self, request_id: str) -> str | None:
        """Return what the endpoint plugin calls a request, None when it does not run."""
        key = self._key_of.get(request_id)
        return None if key is None else f"flexpiped-{self.pids['api']}-{key}"

    def _ensure_alive(self) -> None:
        if self._end is not None:
            raise type(self._end)(str(self._end))

    def _send(self, message: Message) -> None:
        if self._channel is not None:
            self._channel.send(message)
