"""The daemon's side of an engine with a server of its own: start it, supervise it, refactor it, end it.

What vLLM and SGLang have in common stands here; what an engine adds is in ``engines.served.kind``.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

from engines.draining import until_drained
from engines.errors import EngineError, EngineStartFailed, UnsupportedByEngine
from engines.life import Life
from engines.outliving import Outliving
from engines.protocol import EngineCapabilities, EngineCounters, RefactorCheck, RefactorProgress, StageStatus
from engines.served.adopting import AdoptedServer
from engines.served.channel import CallFailed, ChannelClosed, Message
from engines.served.connecting import before_death
from engines.served.handovers import Handovers
from engines.served.keeper_messages import Memo
from engines.served.kind import ServedKind, ServedSetup
from engines.served.leaving import Leaving
from engines.served.link import EngineLink
from engines.served.logs import LogLine
from engines.served.ranks import boot_counts
from engines.served.run_directory import HTTP_SOCKET
from engines.served.server import EngineServer
from engines.served.status import StageReader
from engines.served.streams import Stream
from engines.served.turns import note_departure, turn_to_start
from engines.served.watch import HangWatch
from planner.layout import Pipeline
from planner.model_graph import ModelGraph

_DRAIN_POLL_S: Final = 0.05


class ServedEngine(ServedKind):
    """An ``Engine`` that is a server in an environment of its own.

    Such an engine boots with a decoder on each rank at least: where ``pipeline`` has less, ``pipeline`` is the nearest
    it could boot with once ``start`` has returned, and the epoch has moved on with it.

    Args:
        graph: The model, for the memory of a refactoring; without it none is done.
        on_log: Told each line that the engine writes.
        outliving: How it may outlive this process, or one that has, whose ``ranks`` are those of ``setup``; None: it
            ends with this process.
    """

    def __init__(
        self,
        setup: ServedSetup,
        pipeline: Pipeline,
        *,
        epoch: int,
        graph: ModelGraph | None,
        on_log: Callable[[LogLine], None],
        outliving: Outliving | AdoptedServer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setup = setup
        self._leaving = Leaving(outliving)
        self._adopted = self._leaving.adopted
        self._ranks = setup.handover.ranks
        self._pipeline = pipeline
        self._epoch = epoch
        self._graph = graph
        self._on_log = on_log
        self._on_progress: Callable[[str], None] = lambda _message: None
        self._capabilities: EngineCapabilities | None = None
        self._server: EngineServer | None = None
        self._link: EngineLink | None = None
        self._handovers: Handovers | None = None
        self._stage_reader = StageReader(ranks=self._ranks, clock=clock)
        self._streams: dict[int, Stream] = {}
        # Of requests: the engine may still be ending those of a daemon before this one.
        self._last_key = 0 if self._adopted is None else time.time_ns() // 1000
        self._life = Life(on_end=self._tell_end)
        self._watch = HangWatch(
            deadline_s=setup.hang_deadline_s,
            patience_s=setup.start_deadline_s,
            counters=self.counters,
            has_requests=lambda: bool(self._streams),
            on_hung=lambda verdict: self._note_death(f"{setup.name} is {verdict}"),
            clock=clock,
        )
        self._last_progress = ""
        self.info: Message = {}  # what the engine said of itself when it was ready

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
        try:
            await self._start()
        except EngineError as error:
            await self.close()
            if isinstance(error, EngineStartFailed | UnsupportedByEngine):
                raise
            raise EngineStartFailed(str(error)) from error
        except (OSError, ValueError, CallFailed, ChannelClosed) as error:  # a file, a socket, or an answer of its own
            await self.close()
            raise EngineStartFailed(f"{self._setup.name} did not start: {error}") from error
        except BaseException:
            await self.close()
            raise

    async def counters(self) -> EngineCounters:
        reply = await self._ready_link().core("counters")
        refactorings = 0 if self._handovers is None else self._handovers.refactorings_total
        # its workers live and die with it
        return EngineCounters(**reply, worker_restarts_total=0, refactorings_total=refactorings)

    async def stages(self) -> tuple[StageStatus, ...]:
        pipeline, answers = self.pipeline, await self._ready_link().rank_statuses()
        return self._stage_reader.read(pipeline, answers)

    async def check_refactor(self, target: Pipeline) -> RefactorCheck:
        return await self._ready_handovers().check(target)

    async def refactor(self, target: Pipeline) -> AsyncIterator[RefactorProgress]:
        async for report in self._ready_handovers().refactor(target):
            yield report

    async def cancel_refactor(self) -> bool:
        return await self._ready_handovers().cancel()

    async def drain(self) -> None:
        await until_drained(self.counters, has_streams=lambda: bool(self._streams), poll_s=_DRAIN_POLL_S)

    async def died(self) -> str:
        return await self._life.died()

    async def close(self) -> None:
        stays = self._life.end is None and self._leaving.is_due
        self._life.close()
        await self._watch.stop()
        if self._link is not None:
            await self._link.close()
        if self._server is None:
            return
        if stays:
            await self._server.leave()
            return
        await self._server.close()
        note_departure(self._ranks.device_ids, self._server.processes)
        self._leaving.forget()

    @property
    def is_adopted(self) -> bool:
        """Whether its processes were there before it."""
        return self._adopted is not None

    # --- OwnRoutes ---

    @property
    def own_routes_socket(self) -> Path:
        return self.run_directory / HTTP_SOCKET

    # --- beyond the protocol: for benchmarks and tests ---

    @property
    def pids(self) -> dict[str, Any]:
        """Process ids by role; ``workers`` and ``helpers`` in rank order."""
        return dict(self.info["pids"])

    @property
    def run_directory(self) -> Path:
        """Where the sockets are."""
        assert self._server is not None
        return self._server.run_directory

    async def trace(self) -> Message:
        """Return when steps ended and began since the last call, by the core's clock."""
        reply: Message = await self._ready_link().core("trace")
        return reply

    async def rank_status(self, rank: int) -> Message:
        """Return what one rank says of itself."""
        status: Message = await self._ready_link().sides[rank].call("status")
        return status

    async def arm_failpoint(self, name: str, action: str, *, rank: int | None = None) -> None:
        """Arm a failpoint in the engine core, or in the worker of one rank; an empty name disarms all there."""
        await self._ready_link().arm_failpoint(name, action, rank=rank)

    # --- starting ---

    async def _start(self) -> None:
        if self._adopted is None:
            await self._start_afresh()
        else:
            await self._go_on(self._adopted)
        self._watch.begin()

    async def _start_afresh(self) -> None:
        name, version = self._setup.name, await self._version()
        self._on_progress(f"{name} {version}: waiting for its turn to start")
        counts = self._boot_layout()
        async with turn_to_start(self._ranks.device_ids):
            self._server = server = self._new_server()
            self._life.begin()
            self._on_progress(f"starting {name} {version}")
            await self._launch(server, counts)
            await self._in_time(server)
        memo = Memo(
            version=version,
            device_ids=self._ranks.device_ids,
            tensor_parallel=self._ranks.tensor_parallel,
            counts=counts,
            epoch=self._epoch,
            secrets=self._secrets(),
        )
        await self._leaving.note(server, memo)

    async def _go_on(self, adopted: AdoptedServer) -> None:
        """Begin where the daemon before this one has left: the layout in force is what the engine says."""
        self._server = server = self._new_server()  # first: what is not gone on with is ended
        was, version = adopted.memo.version, await self._version()
        if was != version:
            raise EngineStartFailed(f"{self._setup.name} {was} runs, and its environment has {version} now")
        self._pipeline, self._epoch = adopted.pipeline, adopted.epoch
        self._life.begin()
        await self._in_time(server)
        await self._leaving.note(server, adopted.memo)
        await self._ready_handovers().resume()

    def _new_server(self) -> EngineServer:
        outliving = self._leaving.outliving
        return EngineServer(
            name=self._setup.name,
            dialect=self._setup.dialect,
            on_log=self._note_log,
            on_death=self._note_death,
            place=None if outliving is None else outliving.place,
            kept=None if self._adopted is None else self._adopted.hosted,
        )

    async def _in_time(self, server: EngineServer) -> None:
        deadline_s = self._setup.start_deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                await self._become_ready(server)
        except TimeoutError:
            words = server.with_last_words(f"{self._setup.name} was not ready within {deadline_s:g} s")
            raise EngineStartFailed(words) from None

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

    async def _become_ready(self, server: EngineServer) -> None:
        try:
            channel, self.info = await before_death(self._contact(server), self._life)
        except ChannelClosed as error:
            raise EngineStartFailed(server.with_last_words(str(error))) from error
        setup = self._setup
        self._link = link = EngineLink(
            channel, name=setup.name, listener=setup.listener, life=self._life, on_lost=self._note_death
        )
        server.watch(self._processes())
        await link.connect_ranks(server.run_directory, count=len(self.info["pids"]["workers"]))
        self._life.ensure()
        self._handovers = Handovers(
            setup.handover,
            self._graph,
            channel,
            link.sides,
            pipeline=self._pipeline,
            epoch=self._epoch,
            refusal=self.info["refactor_refusal"],
            requests_live=lambda: len(self._streams),
            on_crash=self._note_death,
            after=self._after_moves(),
            last_number=0 if self._adopted is None else self._adopted.settled.last_number,
        )
        self._capabilities = self._take_over()

    # --- what comes from the engine ---

    def _note_log(self, line: LogLine) -> None:
        self._on_log(line)
        progress = self._setup.dialect.progress(line)
        if progress is None:
            return
        if self._capabilities is None and progress != self._last_progress:
            self._last_progress = progress
            self._on_progress(f"{self._setup.name}: {progress}")
        if self._setup.dialect.takes_long(progress):
            self._watch.works_slowly()

    def _note_death(self, reason: str) -> None:
        if self._server is not None and self._life.end is None:
            self._life.die(self._server.with_last_words(reason))
            self._server.kill()

    # --- inside ---

    def _tell_end(self, end: EngineError) -> None:
        """Nothing more will come: everybody who waits learns why."""
        for stream in self._streams.values():
            stream.fail(end)
        if self._handovers is not None:
            self._handovers.end(end)

    def _ready_handovers(self) -> Handovers:
        self._life.ensure()
        assert self._handovers is not None, "valid once start has returned"
        return self._handovers

    def _ready_link(self) -> EngineLink:
        self._life.ensure()
        assert self._link is not None, "valid once start has returned"
        return self._link
