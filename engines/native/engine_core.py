"""The engine core: keeps the stages busy, takes in results, and recovers from the loss of a worker.

It is the one writer of the scheduler, the layout in force and the generation. Everything here runs on one event loop
and one thread; the handover has a task of its own (``engines.native.handover``) that calls in here between two steps.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING

from engines.errors import InvalidRequest, RefactoringBusy
from engines.failpoints import Failpoints
from engines.native import client_messages as c
from engines.native import messages as m
from engines.native.adapters import Adapters
from engines.native.batch import Batch
from engines.native.boot import Boot
from engines.native.details import details_of
from engines.native.feasibility import too_large
from engines.native.handover import HandoverRunner
from engines.native.hang_watch import kill_what_hangs
from engines.native.inquiries import Inquiries
from engines.native.kv_blocks import KVBlocks
from engines.native.kv_resizing import KvResizer
from engines.native.matchers import Matchers
from engines.native.options import micro_batches_for, threads_per_stage
from engines.native.recovery import Recovery
from engines.native.request_intake import sequence_of
from engines.native.scheduler import Scheduler
from engines.native.specs import specs_of
from engines.native.stage_loading import StageLoading
from engines.native.step_messages import outputs_of, run_step_of, sampled_of
from engines.native.step_totals import StepTotals, counters_of
from engines.native.steps_in_flight import StepsInFlight
from engines.native.trace import StepTrace
from engines.native.worker_losses import WorkerLosses
from engines.native.workers import WorkerPool
from engines.process import usable_cores
from engines.protocol import EngineCounters
from planner.layout import Pipeline

if TYPE_CHECKING:
    from engines.native.grammar import Matcher


class EngineCore:
    """One replica."""

    def __init__(self, boot: Boot, pool: WorkerPool, *, emit: Callable[[c.CoreReport], None]) -> None:
        self.boot = boot
        self.pool = pool
        self.pipeline = boot.pipeline
        self.epoch = boot.epoch
        self.failpoints = Failpoints()
        self.trace = StepTrace()
        self.handover: HandoverRunner | None = None
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.totals = StepTotals()
        self.worker_of = {device: index for index, device in enumerate(boot.options.device_ids)}
        self.scheduler = Scheduler(
            limits=boot.limits,
            blocks=KVBlocks(num_blocks=boot.num_blocks),
            table=boot.context.shared.block_table,
            caches_prefixes=boot.options.prefix_caching,
        )
        self.scheduler.resize_kv(boot.kv_blocks_of(boot.pipeline))
        self._tickets = count(1)
        self.inquiries = Inquiries(pool, self._tickets)
        self.kv = KvResizer(
            scheduler=self.scheduler,
            inquiries=self.inquiries,
            pool=pool,
            shared=boot.context.shared,
            least=boot.least_kv_blocks,
            block_tokens=boot.limits.kv_block_tokens,
            blocks_at_once=max(1, boot.options.slice_bytes // boot.kv_block_bytes),
        )
        self.adapters = Adapters(
            boot.options.adapters,
            pool=pool,
            is_used=self._is_adapter_used,
            too_large=self._adapters_too_large,
            fail=self.fail,
        )
        self.matchers = Matchers(go_on=self._take, refuse=self._refuse, fail=self.fail)
        self._emit = emit
        self._in_flight = StepsInFlight()
        self._holding = True  # until the first stages are loaded
        self._loading = StageLoading(pool.send)
        self._recovery = Recovery(self._loading, specs=self._specs, on_loaded=self._recovered, fail=self.fail)
        self._losses = WorkerLosses(pool.size)
        self._workers: list[int] = []  # stage by stage

    # --- requests ---

    def submit(self, request: c.Submit) -> None:
        """Queue a request, or say that it cannot be run."""
        self.matchers.give(request)

    def _refuse(self, request: c.Submit, refusal: InvalidRequest) -> None:
        self._emit(c.Refused(key=request.key, message=str(refusal), parameter=refusal.parameter, code=refusal.code))

    def _take(self, request: c.Submit, matcher: "Matcher | None") -> None:
        try:
            sequence = sequence_of(
                request,
                boot=self.boot,
                adapters=self.adapters,
                matcher=matcher,
                order=self.scheduler.take_order(),
            )
        except InvalidRequest as refusal:
            self._refuse(request, refusal)
            return
        self.totals.prompt_tokens += len(request.prompt)
        if sequence.matcher is not None and sequence.matcher.is_done:  # the engine before had no time to say so
            self._emit(c.Outputs(keys=[request.key], tokens=[-1], finishes=["stop"], logprobs=[None]))
            return
        self.scheduler.add(sequence)
        self.pump()

    def _is_adapter_used(self, number: int) -> bool:
        if self.recovering:  # until workers have their new roles they run steps of before, which nothing here knows
            return True
        return any(each.adapter == number for each in (*self.scheduler.sequences, *self._in_flight.sequences))

    def _adapters_too_large(self, adapter_bytes: int) -> str:
        target = None if self.handover is None else self.handover.target
        return too_large(self.boot, current=self.pipeline, target=target, adapter_bytes=adapter_bytes)

    def abort(self, key: int) -> None:
        self.matchers.forget(key)
        self.scheduler.abort(key)
        self.pump()  # its KV blocks may let another one in

    def abort_all(self) -> None:
        """Forget every request; those in flight are freed when their steps end."""
        self.matchers.forget_all()
        self.scheduler.abort_all()
        self.pump()

    async def until_idle(self) -> None:
        """Return when no step is in flight. Not during a handover, which waits for that itself."""
        await self.drain_steps()
        self.resume()

    # --- steps ---

    def pump(self) -> None:
        """Dispatch micro-batches while the stages can take more."""
        self.adapters.between_steps()
        if not self._holding:
            self.kv.between_steps(self._workers)
        while not self._holding and len(self._in_flight) < self.scheduler.micro_batches:
            batch = self.scheduler.schedule()
            if batch is None:
                return
            self._dispatch(batch)

    def _dispatch(self, batch: Batch) -> None:
        raw = m.encode(run_step_of(batch, generation=self._in_flight.generation, shared=self.boot.context.shared))
        now = time.monotonic()
        self._in_flight.dispatched(batch, now_s=now)
        self.trace.dispatched(now, self.epoch)
        for worker in self._workers:
            self.pool.send_raw(worker, raw)

    def _step_done(self, done: m.StepDone) -> None:
        batch = self._in_flight.ended(done.step_id, generation=done.generation)
        if batch is None:
            return
        now = time.monotonic()
        if self.handover is not None:
            self.handover.mark_written(batch)
        tokens, logprobs = sampled_of(done)
        outputs = self.scheduler.finish_step(batch, tokens, logprobs, details_of(done))
        self.totals.steps += 1
        self.trace.ended(now, self.epoch)
        self.pump()  # first: the stages compute while the results are told
        if outputs:
            self.totals.generated_tokens += len(outputs)
            self._emit(outputs_of(outputs))

    # --- between two steps: what a handover needs ---

    async def drain_steps(self) -> None:
        """Hold scheduling and return when no micro-batch is in flight."""
        self._holding = True
        await self._in_flight.drained()

    def resume(self) -> None:
        """Schedule again, unless a recovery is under way: that resumes when it is done."""
        if not self.recovering:
            self._holding = False
            self.pump()

    def record(self, target: Pipeline) -> None:
        """The commit point: from here on ``target`` is the layout in force."""
        self.pipeline = target
        self.epoch += 1

    def adopt(self) -> None:
        """Tell every worker its role under a new generation. Steps and messages of older ones are void."""
        self._in_flight.void()
        cores = self.boot.options.threads or usable_cores()
        stages = self.pipeline.granularity
        threads = threads_per_stage(num_stages=stages, threads=cores, per_device=self.boot.options.threads_per_device)
        specs = self._specs()
        self._workers = list(specs)
        self.scheduler.micro_batches = micro_batches_for(self.boot.options, num_stages=stages, cores=cores)
        for index in range(self.pool.size):
            spec = specs.get(index)
            # A worker without a stage has one thread, so that what it prepares stays out of the others' way.
            own = threads if spec is not None else 1
            self.pool.send(index, m.Adopt(generation=self._in_flight.generation, spec=spec, threads=own))

    async def resize_kv(self, capacity: int) -> int:
        """Have another number of KV blocks; return the bytes given back. A handover counts on those there are.

        Raises:
            RefactoringBusy, RefactoringRefused
        """
        if self.handover is not None:
            raise RefactoringBusy(f"a refactoring is under way: {self.handover.describe()}")
        if self.recovering:
            raise RefactoringBusy("a lost worker is being recovered")
        return await self.kv.resize(capacity, pump=self.pump)

    async def make_way(self, target: Pipeline) -> None:
        """Have no more KV blocks than the devices hold while the layout in force and ``target`` both exist."""
        await self.kv.make_way(self.boot.kv_blocks_of(self.pipeline, target), pump=self.pump)

    async def follow_layout(self) -> None:
        """Have the KV blocks of the layout in force, which is the only one now. Where there is no memory: later."""
        before = self.kv.range
        with suppress(RefactoringBusy):
            await self.kv.follow(self.boot.kv_blocks_of(self.pipeline), pump=self.pump)
        if self.kv.range != before:
            self._emit(c.KvRangeChanged(kv_range=self.kv.range))

    # --- workers ---

    async def start(self) -> None:
        """Load the first layout and begin to schedule.

        Raises:
            StageNotLoaded: A worker could not load its layers.
        """
        await self._loading.load(self._specs())
        self.adopt()
        self.resume()

    def _specs(self) -> dict[int, m.StageSpec]:
        return specs_of(self.pipeline, self.worker_of)

    def on_report(self, report: m.WorkerReport) -> None:
        """Take in what a worker says."""
        match report:
            case m.StepDone():
                self._step_done(report)
            case m.Stats() | m.Checksums() | m.Steps() | m.KvBounded():
                self.inquiries.settle(report)
            case m.AdapterLoaded():
                self.adapters.on_report(report)
            case m.Crashed():
                self._losses.said(report.worker, report.reason)
            case m.Prepared() | m.Failed() if report.handover == 0:
                self._loading.on_report(report)
            case m.Failed() if self.inquiries.failed(report):
                pass
            case m.Prepared() | m.Failed() | m.Copied() | m.Released():
                if self.handover is not None:
                    self.handover.on_report(report)

    def on_worker_death(self, index: int, reason: str) -> None:
        """Restart a worker that ended; if it carried a stage, compute again what was lost with it."""
        reason = self._losses.ended(index, reason, now_s=time.monotonic())
        if self._losses.are_too_many:
            self.fail(f"workers keep dying: {reason}")
            return
        self.pool.restart(index)
        self.adapters.restarted(index)
        self._loading.failed(index, reason)
        self.inquiries.forget(index)
        if index in self._specs():
            self._begin_recovery()
        if self.handover is not None:
            self.handover.worker_lost(index, reason)

    def _begin_recovery(self) -> None:
        self._holding = True
        self._in_flight.void()
        self.scheduler.recompute_all()
        self._recovery.begin()

    def _recovered(self) -> None:
        self.adopt()
        if self.handover is None or not self.handover.holds_scheduling:
            self.resume()

    def fail(self, reason: str) -> None:
        """End the engine: the daemon starts another and goes on from its own copy of the requests."""
        if not self.failed.done():
            self.failed.set_result(reason)

    async def watch_for_hangs(self) -> None:
        """Kill stage workers that hang; their loss is then recovered as a crash."""
        await kill_what_hangs(
            self.pool,
            self.inquiries,
            oldest_s=self._oldest_dispatch_s,
            workers=lambda: self._workers,
            deadline_s=self.boot.options.hang_deadline_s,
        )

    def _oldest_dispatch_s(self) -> float | None:
        return None if self.recovering else self._in_flight.oldest_s

    @property
    def recovering(self) -> bool:
        return self._recovery.is_under_way

    def take_ticket(self) -> int:
        """Return a number that names one question or piece of work."""
        return next(self._tickets)

    def counters(self) -> EngineCounters:
        return counters_of(self.totals, self.scheduler, boot=self.boot, worker_restarts=self.pool.restarts)
