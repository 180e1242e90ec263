"""Carries out a handover on the stage workers. ``planner.handover`` decides the steps, this performs them.

The runner lives in the engine core, because the commit happens between two steps: hold, drain, copy the remainder,
record the new epoch, tell every worker, go on. Before the commit point any failure rolls back; after it there is only
forward.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, assert_never

import numpy as np
import numpy.typing as npt

from engines.failpoints import FailpointHit
from engines.native import messages as m
from engines.native.inquiries import settle
from engines.native.scheduler import Batch
from engines.native.shared import STAGING_BUFFERS
from engines.native.specs import specs_of
from engines.native.transfer import DirtySlots, Piece, Route, pieces_of, routes_between
from engines.process import usable_cores
from engines.protocol import RefactorProgress
from planner import handover_events as e
from planner.handover import Handover, HandoverLimits, describe, new_handover, step
from planner.layout import Pipeline
from planner.moves import moves

if TYPE_CHECKING:
    from engines.native.engine_core import EngineCore

_FIRST_STEP_WAIT_S = 0.5


class _WorkFailed(Exception):
    """A piece of the handover did not work out; the state machine decides what that means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverResult:
    """How it ended. ``state.phase`` is DONE or ABORTED."""

    state: Handover
    progress: RefactorProgress


class HandoverRunner:
    """One handover from the pipeline in force to ``target``."""

    def __init__(
        self, core: "EngineCore", target: Pipeline, *, on_progress: Callable[[RefactorProgress], None]
    ) -> None:
        options = core.boot.options
        self._core = core
        self._target = target
        self._on_progress = on_progress
        self._id = core.take_ticket()
        self._events: asyncio.Queue[e.Event] = asyncio.Queue()
        limits = HandoverLimits(
            prepare_deadline_s=options.prepare_deadline_s,
            sync_deadline_s=options.sync_deadline_s,
            commit_deadline_s=options.commit_deadline_s,
            max_rounds=options.max_rounds,
            remainder_slots=options.remainder_slots,
        )
        self.state = new_handover(now_s=time.monotonic(), limits=limits)
        self._specs = specs_of(target, core.worker_of)
        self._routes = routes_between(core.pipeline, target, core.worker_of)
        self._participants = set(self._specs) | set(specs_of(core.pipeline, core.worker_of))
        self._dirty: DirtySlots | None = None
        self._prepared_bytes: dict[int, int] = {}
        self._tickets: dict[int, asyncio.Future[None]] = {}
        self._prepared: dict[int, asyncio.Future[None]] = {}
        self._released: dict[int, asyncio.Future[m.Released]] = {}
        self._work: asyncio.Task[None] | None = None
        self._stepped = asyncio.Event()  # a step has ended since the commit
        self.holds_scheduling = False
        self._progress = RefactorProgress(
            phase=self.state.phase,
            message="",
            elapsed_s=0.0,
            weights_total_bytes=sum(move.weight_bytes for move in moves(core.pipeline, target, core.boot.graph)),
        )

    # --- what the core tells ---

    def mark_written(self, batch: Batch) -> None:
        """A step has ended: what it wrote must be sent (again). Called before its sequences move on."""
        self._stepped.set()
        if self._dirty is not None:
            for entry in batch.entries:
                slots = self._core.scheduler.slots_of(entry.sequence, entry.start, entry.start + entry.count)
                self._dirty.mark(slots)

    def on_report(self, report: m.Prepared | m.Failed | m.Copied | m.Released) -> None:
        """Take in a worker's answer; answers to another handover are stale."""
        if report.handover != self._id:
            return
        match report:
            case m.Prepared():
                if report.done:
                    settle(self._prepared.get(report.worker), None)
                else:
                    self._prepared_bytes[report.worker] = report.weights_bytes
                    self._tell()
            case m.Failed():
                self._events.put_nowait(e.Failed(f"worker {report.worker}: {report.reason}"))
            case m.Copied():
                settle(self._tickets.pop(report.ticket, None), None)
            case m.Released():
                settle(self._released.get(report.worker), report)
            case _:
                assert_never(report)

    def worker_lost(self, index: int, reason: str) -> None:
        """A worker has died. The core restarts it and recovers its stage; the handover must not count on it."""
        if index in self._participants:
            self._participants.discard(index)
            waiting = self._released.get(index)
            if waiting is not None and not waiting.done():
                waiting.cancel()
            self._events.put_nowait(e.ParticipantLost(reason))

    def describe(self) -> str:
        """Return where it stands, in words."""
        return f"to {self._target.granularity} stages, {describe(self.state)}"

    def cancel(self) -> bool:
        """Ask to roll back; False past the commit point."""
        if not self.state.cancellable:
            return False
        self._events.put_nowait(e.Cancelled())
        return True

    # --- the loop: events in, effects out ---

    async def run(self) -> HandoverResult:
        """Perform the handover to its end."""
        self._apply(e.Started())
        while not self.state.finished:
            self._apply(await self._next_event())
        self._stop_work()
        self._tell()
        return HandoverResult(state=self.state, progress=self._progress)

    async def _next_event(self) -> e.Event:
        deadline = self.state.phase_deadline_s
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            return await asyncio.wait_for(self._events.get(), timeout)
        except TimeoutError:
            return e.Tick()

    def _apply(self, event: e.Event) -> None:
        self.state, effects = step(self.state, event, now_s=time.monotonic())
        self._tell()
        for effect in effects:
            match effect:
                case e.Prepare():
                    self._start(self._prepare())
                case e.CopyRound():
                    self._start(self._copy_round())
                case e.Commit():
                    self._start(self._commit())
                case e.Retire():
                    self._start(self._retire())
                case e.RollBack():
                    self._start(self._roll_back())
                case e.Recover():
                    pass  # the core has begun to recover in the new layout
                case _:
                    assert_never(effect)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        """Perform an effect; what an earlier one began is stopped first."""
        self._stop_work()
        self._work = asyncio.get_running_loop().create_task(self._guard(work))

    def _stop_work(self) -> None:
        if self._work is not None and self._work is not asyncio.current_task():
            self._work.cancel()

    async def _guard(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except (_WorkFailed, FailpointHit) as error:
            self._events.put_nowait(e.Failed(str(error)))

    # --- the effects ---

    async def _prepare(self) -> None:
        self._core.failpoints.hit("core.prepare")
        loop = asyncio.get_running_loop()
        # Half of the cores stay with the steps: more workers loading at once would only slow the streams down.
        turns = asyncio.Semaphore(max(1, usable_cores() // 2))

        async def prepare(index: int, spec: m.StageSpec) -> None:
            async with turns:
                self._prepared[index] = loop.create_future()
                self._core.pool.send(index, m.Prepare(handover=self._id, spec=spec))
                await self._prepared[index]

        await asyncio.gather(*(prepare(index, spec) for index, spec in self._specs.items()))
        self._events.put_nowait(e.Prepared())

    async def _copy_round(self) -> None:
        self._core.failpoints.hit("core.round")
        scheduler = self._core.scheduler
        if self._dirty is None:
            self._dirty = DirtySlots(num_slots=self._core.boot.context.num_slots, live=scheduler.live_slots())
        slots = self._dirty.take(scheduler.live_slots())
        sent_bytes = await self._send(slots)
        self._events.put_nowait(
            e.RoundSent(sent_slots=len(slots), sent_bytes=sent_bytes, remainder_slots=self._dirty.count)
        )

    async def _commit(self) -> None:
        """Between two steps: copy what is left and switch. Nothing is awaited between the commit point and the end."""
        core, dirty = self._core, self._dirty
        assert dirty is not None
        self.holds_scheduling = True
        held_s = time.monotonic()
        core.failpoints.hit("core.drain")
        await core.drain_steps()
        drained_s = time.monotonic()
        core.failpoints.hit("core.commit")
        await self._send(dirty.take(core.scheduler.live_slots()))
        if core.boot.options.verify_checksums:
            await self._compare_checksums()
        core.failpoints.hit("core.commit.last")
        if not self._events.empty():  # cancelled or failed meanwhile: that comes first, and rolls back
            return
        had_work = core.scheduler.num_running > 0
        core.record(self._target)
        self._dirty = None
        self._apply_committed()
        core.adopt()
        self._stepped.clear()
        self.holds_scheduling = False
        core.resume()
        last_result_s = max(core.trace.last_end_s, held_s) if had_work else drained_s
        resumed_s = core.trace.first_dispatch_s.get(core.epoch, time.monotonic())
        self._progress = replace(
            self._progress,
            commit_pause_s=resumed_s - last_result_s,
            drain_s=max(0.0, drained_s - held_s),
            epoch=core.epoch,
        )
        self._tell()

    def _apply_committed(self) -> None:
        """Pass the commit point at once, not through the queue; the effect it asks for (retire) comes next."""
        self.state, _ = step(self.state, e.Committed(), now_s=time.monotonic())
        asyncio.get_running_loop().call_soon(self._start_retire)

    def _start_retire(self) -> None:
        self._work = asyncio.get_running_loop().create_task(self._guard(self._retire()))

    async def _retire(self) -> None:
        self._core.failpoints.hit("core.retire")
        await self._first_step()
        await self._release_all()
        self._events.put_nowait(e.Retired())

    async def _first_step(self) -> None:
        """Let the new layout take its first step before memory is given back: that step finds cold caches."""
        if self._core.scheduler.num_running:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stepped.wait(), _FIRST_STEP_WAIT_S)

    async def _roll_back(self) -> None:
        """Free what was prepared, and schedule again if scheduling was held."""
        self._dirty = None
        if self.holds_scheduling:
            self.holds_scheduling = False
            self._core.resume()
        await self._release_all()
        self._events.put_nowait(e.RolledBack())

    async def _release_all(self) -> None:
        """Have the workers free what no role needs, one after the other, so that the others' steps keep their cores."""
        loop = asyncio.get_running_loop()
        returned = 0
        for index in sorted(self._participants):
            if index not in self._participants:  # lost meanwhile
                continue
            self._released[index] = loop.create_future()
            self._core.pool.send(index, m.Release(handover=self._id))
            [answer] = await asyncio.gather(self._released[index], return_exceptions=True)
            if isinstance(answer, m.Released):
                returned += answer.weights_bytes + answer.kv_bytes
        self._progress = replace(self._progress, returned_bytes=returned)

    # --- copying ---

    async def _send(self, slots: npt.NDArray[np.int64]) -> int:
        """Copy token slots over every route, sources side by side; return the bytes sent."""
        options = self._core.boot.options
        slot_bytes = self._core.boot.graph.decoders[0].kv_bytes_per_token
        by_source: dict[int, list[Route]] = {}
        for route in self._routes:
            by_source.setdefault(route.source, []).append(route)
        pieces = {
            source: [
                piece
                for route in routes
                for piece in pieces_of(route, slots, decoder_slot_bytes=slot_bytes, slice_bytes=options.slice_bytes)
            ]
            for source, routes in by_source.items()
        }
        await asyncio.gather(*(self._send_from(source, cut) for source, cut in pieces.items()))
        return sum(len(p.slots) * len(p.decoders) * slot_bytes for cut in pieces.values() for p in cut)

    async def _send_from(self, source: int, pieces: list[Piece]) -> None:
        """Send one source's pieces in order, as many at a time as it has staging buffers."""
        loop = asyncio.get_running_loop()
        outstanding: list[asyncio.Future[None]] = []
        for number, piece in enumerate(pieces):
            if len(outstanding) == STAGING_BUFFERS:
                await outstanding.pop(0)
            ticket = self._core.take_ticket()
            self._tickets[ticket] = loop.create_future()
            outstanding.append(self._tickets[ticket])
            self._core.pool.send(
                source,
                m.CopyOut(
                    handover=self._id,
                    ticket=ticket,
                    target=piece.route.target,
                    buffer=number % STAGING_BUFFERS,
                    decoders=piece.decoders,
                    slots=piece.slots.tobytes(),
                ),
            )
        for future in outstanding:
            await future

    async def _compare_checksums(self) -> None:
        """Every live KV block must be the same on source and destination."""
        blocks = self._core.scheduler.live_blocks()
        for route in self._routes:
            decoders = list(route.decoders)
            left = await self._core.inquiries.checksums(route.source, decoders, blocks)
            right = await self._core.inquiries.checksums(route.target, decoders, blocks)
            if left != right:
                wrong = sum(a != b for a, b in zip(left, right, strict=True))
                raise _WorkFailed(
                    f"{wrong} of {len(left)} KV blocks differ between worker {route.source} and {route.target}"
                )

    def _tell(self) -> None:
        state = self.state
        self._progress = replace(
            self._progress,
            phase=state.phase,
            message=describe(state),
            elapsed_s=time.monotonic() - state.started_s,
            weights_bytes=sum(self._prepared_bytes.values()),
            kv_round=len(state.rounds),
            kv_bytes=state.kv_bytes,
            kv_round_bytes=tuple(r.sent_bytes for r in state.rounds),
            requests_live=self._core.scheduler.num_live,
        )
        self._on_progress(self._progress)
