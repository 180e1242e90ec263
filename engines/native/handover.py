"""Carries out a handover on the stage workers. ``planner.handover`` decides the steps, this performs them.

The runner lives in the engine core, because the commit happens between two steps: hold, drain, copy the remainder,
record the new epoch, tell every worker, go on. Before the commit point any failure rolls back; after it there is only
forward.

KV blocks that are kept for prompts to come go along: they are sent in the first round, as they are not written again,
so that the commit does not wait for them.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

import numpy as np
import numpy.typing as npt

from engines.handover_loop import HandoverLoop, WorkFailed
from engines.native import messages as m
from engines.native.batch import Batch
from engines.native.inquiries import settle
from engines.native.pacing import CopyPace
from engines.native.shared import STAGING_BUFFERS
from engines.native.specs import specs_of
from engines.native.transfer import DirtySlots, Piece, Route, pieces_of, routes_between
from engines.process import usable_cores
from engines.protocol import RefactorProgress
from planner import handover_events as e
from planner.layout import Pipeline
from planner.moves import moves

if TYPE_CHECKING:
    from engines.native.engine_core import EngineCore

_FIRST_STEP_WAIT_S = 0.5


class HandoverRunner(HandoverLoop):
    """One handover from the pipeline in force to ``target``."""

    def __init__(
        self, core: "EngineCore", target: Pipeline, *, on_progress: Callable[[RefactorProgress], None]
    ) -> None:
        options = core.boot.options
        super().__init__(
            target,
            limits=options.handover_limits,
            weights_total_bytes=sum(move.weight_bytes for move in moves(core.pipeline, target, core.boot.graph)),
            on_progress=on_progress,
        )
        self._core = core
        self._id = core.take_ticket()
        self._specs = specs_of(target, core.worker_of)
        self._routes = routes_between(core.pipeline, target, core.worker_of)
        self._participants = set(self._specs) | set(specs_of(core.pipeline, core.worker_of))
        self._dirty: DirtySlots | None = None
        self._prepared_bytes: dict[int, int] = {}
        self._pace = CopyPace(cap_bytes_per_s=options.copy_bytes_per_s or None, deadline_s=options.sync_deadline_s)
        self._tickets: dict[int, tuple[int, asyncio.Future[None]]] = {}  # with the bytes
        self._prepared: dict[int, asyncio.Future[None]] = {}
        self._released: dict[int, asyncio.Future[m.Released]] = {}
        self._stepped = asyncio.Event()  # a step has ended since the commit
        self.holds_scheduling = False

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
                    self.report()
            case m.Failed():
                self.tell(e.Failed(f"worker {report.worker}: {report.reason}"))
            case m.Copied():
                num_bytes, waiting = self._tickets.pop(report.ticket, (0, None))
                if num_bytes:
                    self._pace.took(num_bytes, report.busy_s)
                settle(waiting, None)
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
            self.tell(e.ParticipantLost(reason))

    # --- the effects ---

    async def prepare(self) -> None:
        self._core.failpoints.hit("core.prepare")
        await self._core.make_way(self.target)
        loop = asyncio.get_running_loop()
        # Half of the cores stay with the steps: more workers loading at once would only slow the streams down.
        turns = asyncio.Semaphore(max(1, usable_cores() // 2))

        async def prepare(index: int, spec: m.StageSpec) -> None:
            async with turns:
                if self._core.recovering:  # a worker loads for one at a time: the recovery would wait for ever
                    raise WorkFailed("a lost worker is being recovered")
                self._prepared[index] = loop.create_future()
                self._core.pool.send(index, m.Prepare(handover=self._id, spec=spec))
                await self._prepared[index]

        await asyncio.gather(*(prepare(index, spec) for index, spec in self._specs.items()))
        self.tell(e.Prepared())

    async def copy_round(self) -> None:
        self._core.failpoints.hit("core.round")
        scheduler = self._core.scheduler
        if self._dirty is None:
            self._drop_too_much()
            self._dirty = DirtySlots(num_slots=self._core.boot.context.num_slots, live=scheduler.live_slots())
        slots = self._dirty.take(scheduler.live_slots())
        sent_bytes = await self._send(slots, pace=self._pace)
        self.tell(e.RoundSent(sent_slots=len(slots), sent_bytes=sent_bytes, remainder_slots=self._dirty.count))

    async def commit(self) -> None:
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
        if self.has_events:  # cancelled or failed meanwhile: that comes first, and rolls back
            return
        had_work = core.scheduler.num_running > 0
        core.record(self.target)
        self._dirty = None
        self.committed(epoch=core.epoch)
        core.adopt()
        self._stepped.clear()
        self.holds_scheduling = False
        core.resume()
        last_result_s = max(core.trace.last_end_s, held_s) if had_work else drained_s
        resumed_s = core.trace.first_dispatch_s.get(core.epoch, time.monotonic())
        self.note(commit_pause_s=resumed_s - last_result_s, drain_s=max(0.0, drained_s - held_s))

    async def retire(self) -> None:
        self._core.failpoints.hit("core.retire")
        await self._first_step()
        await self._release_all()
        self.tell(e.Retired())

    async def _first_step(self) -> None:
        """Let the new layout take its first step before memory is given back: that step finds cold caches."""
        if self._core.scheduler.num_running:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stepped.wait(), _FIRST_STEP_WAIT_S)

    async def roll_back(self) -> None:
        """Free what was prepared, and schedule again if scheduling was held."""
        self._dirty = None
        if self.holds_scheduling:
            self.holds_scheduling = False
            self._core.resume()
        await self._release_all()
        self.tell(e.RolledBack())

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
        self.note(returned_bytes=returned)

    # --- copying ---

    def _drop_too_much(self) -> None:
        """Of what is kept for prompts to come, keep what the cap lets through in half of the time for rounds."""
        options, scheduler = self._core.boot.options, self._core.scheduler
        decoders = sum(len(route.decoders) for route in self._routes)
        if options.copy_bytes_per_s and decoders:
            block_bytes = decoders * self._slot_bytes * options.kv_block_tokens
            most = int(options.copy_bytes_per_s * options.sync_deadline_s / 2) // block_bytes
            scheduler.drop_cached(keep=max(0, most - scheduler.kv_blocks_used))

    @property
    def _slot_bytes(self) -> int:
        """Of one token slot of one decoder."""
        return self._core.boot.graph.decoders[0].kv_bytes_per_token

    async def _send(self, slots: npt.NDArray[np.int64], *, pace: CopyPace | None = None) -> int:
        """Copy token slots over every route, sources side by side; return the bytes sent. No pace: at once."""
        options, slot_bytes = self._core.boot.options, self._slot_bytes
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
        sent_bytes = sum(self._bytes_of(piece) for cut in pieces.values() for piece in cut)
        if pace is not None:
            pace.begin(sent_bytes)
        await asyncio.gather(*(self._send_from(source, cut, pace) for source, cut in pieces.items()))
        return sent_bytes

    def _bytes_of(self, piece: Piece) -> int:
        return len(piece.slots) * len(piece.decoders) * self._slot_bytes

    async def _until_due(self, num_bytes: int, pace: CopyPace) -> None:
        now_s = time.monotonic()
        at_s = pace.send_s(num_bytes, now_s=now_s, requests_run=self._core.scheduler.num_running > 0)
        if at_s > now_s:
            await asyncio.sleep(at_s - now_s)

    async def _send_from(self, source: int, pieces: list[Piece], pace: CopyPace | None) -> None:
        """Send one source's pieces in order, as many at a time as it has staging buffers."""
        loop = asyncio.get_running_loop()
        outstanding: list[asyncio.Future[None]] = []
        for number, piece in enumerate(pieces):
            if len(outstanding) == STAGING_BUFFERS:
                await outstanding.pop(0)
            num_bytes = self._bytes_of(piece)
            if pace is not None:
                await self._until_due(num_bytes, pace)
            ticket, done = self._core.take_ticket(), loop.create_future()
            self._tickets[ticket] = num_bytes, done
            outstanding.append(done)
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
                raise WorkFailed(
                    f"{wrong} of {len(left)} KV blocks differ between worker {route.source} and {route.target}"
                )

    def news(self, progress: RefactorProgress) -> RefactorProgress:
        return replace(
            progress,
            weights_bytes=sum(self._prepared_bytes.values()),
            requests_live=self._core.scheduler.num_live,
        )
