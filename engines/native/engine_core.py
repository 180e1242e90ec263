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

import numpy as np

from engines.errors import InvalidRequest, RefactoringBusy
from engines.failpoints import Failpoints
from engines.native import client_messages as c
from engines.native import messages as m
from engines.native.adapters import Adapters
from engines.native.asks import asks_of
from engines.native.boot import Boot
from engines.native.details import details_of
from engines.native.handover import HandoverRunner
from engines.native.inquiries import Inquiries, settle
from engines.native.kv_blocks import KVBlocks
from engines.native.kv_resizing import KvResizer
from engines.native.options import micro_batches_for, threads_per_stage
from engines.native.scheduler import Batch, Output, Scheduler
from engines.native.sequence import Sequence
from engines.native.specs import specs_of
from engines.native.trace import StepTrace
from engines.native.workers import WorkerPool
from engines.process import usable_cores
from engines.protocol import EngineCounters
from planner.layout import Pipeline

if TYPE_CHECKING:
    from engines.native.grammar import Grammars, Matcher


class EngineFailed(Exception):
    """The core cannot go on; the message is for the operator."""


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
        self.grammars: Grammars | None = None  # set before the first request
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.refactorings = 0
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
        self.adapters = Adapters(boot.options.adapters, pool=pool, is_used=self._is_adapter_used, fail=self.fail)
        self._emit = emit
        self._generation = 0
        self._in_flight: dict[int, tuple[Batch, float]] = {}
        self._holding = True  # until the first stages are loaded
        self._drained: asyncio.Future[None] | None = None
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._recovery: asyncio.Task[None] | None = None
        self._deaths: list[float] = []
        self._last_words: dict[int, str] = {}
        self._workers: list[int] = []  # stage by stage
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._steps = 0

    # --- requests ---

    def submit(self, request: c.Submit) -> None:
        """Queue a request, or say that it cannot be run."""
        try:
            adapter = self._adapter_of(request)
            matcher = self._matcher_of(request)
        except InvalidRequest as refusal:
            self._emit(c.Refused(key=request.key, message=str(refusal), parameter=refusal.parameter, code=refusal.code))
            return
        self._prompt_tokens += len(request.prompt)
        if matcher is not None and matcher.is_done:  # the engine before this one had no time to say so
            self._emit(c.Outputs(keys=[request.key], tokens=[-1], finishes=["stop"], logprobs=[None]))
            return
        eos = () if request.sampling.ignore_eos else self.boot.eos_token_ids
        self.scheduler.add(
            Sequence(
                key=request.key,
                prompt=request.prompt,
                generated=request.generated,
                sampling=request.sampling,
                stop_ids=frozenset((*request.sampling.stop_token_ids, *eos)),
                order=self.scheduler.take_order(),
                shaping=request.shaping,
                matcher=matcher,
                adapter=adapter,
            )
        )
        self.pump()

    def _adapter_of(self, request: c.Submit) -> int:
        name = request.sampling.adapter
        number = self.adapters.number_of(name)
        if number is None:
            raise InvalidRequest(f"adapter {name!r} is not loaded any more", parameter="model", code="model_not_found")
        return number

    def _is_adapter_used(self, number: int) -> bool:
        in_flight = (entry.sequence for batch, _ in self._in_flight.values() for entry in batch.entries)
        return any(each.adapter == number for each in (*self.scheduler.sequences, *in_flight))

    def _matcher_of(self, request: c.Submit) -> "Matcher | None":
        grammar = request.sampling.grammar
        if grammar is None:
            return None
        if self.grammars is None:
            raise InvalidRequest("this model's output cannot be kept to a grammar", parameter=grammar.parameter)
        matcher = self.grammars.matcher(grammar, request.generated)
        allowed = None if request.shaping is None else request.shaping.allowed
        if allowed is not None and not matcher.is_done and not matcher.takes_any(allowed, self.boot.vocab_size):
            message = f"allowed_token_ids leaves {grammar.parameter} no token to begin with"
            raise InvalidRequest(message, parameter="allowed_token_ids", code="contradiction")
        return matcher

    def abort(self, key: int) -> None:
        self.scheduler.abort(key)
        self.pump()  # its KV blocks may let another one in

    def abort_all(self) -> None:
        """Forget every request; those in flight are freed when their steps end."""
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
        entries = batch.entries
        sampled = [i for i, entry in enumerate(entries) if entry.samples]
        tokens = [t for e in entries for t in e.sequence.tokens[e.start : e.start + e.count]]
        asks = asks_of(batch, sampled, self.boot.context.shared)
        adapters = [e.sequence.adapter for e in entries]
        raw = m.encode(
            m.RunStep(
                step_id=batch.step_id,
                generation=self._generation,
                rows=_int32([e.sequence.row for e in entries]),
                starts=_int32([e.start for e in entries]),
                counts=_int32([e.count for e in entries]),
                tokens=_int32(tokens),
                sampled=_int32(sampled),
                draws=asks.draws,
                logprobs=asks.logprobs,
                shapes=asks.shapes,
                tops=asks.tops,
                scored=asks.scored,
                adapters=_int32(adapters) if any(adapters) else b"",
            )
        )
        now = time.monotonic()
        self._in_flight[batch.step_id] = (batch, now)
        self.trace.dispatched(now, self.epoch)
        for worker in self._workers:
            self.pool.send_raw(worker, raw)

    def _step_done(self, done: m.StepDone) -> None:
        if done.generation != self._generation:
            return
        now = time.monotonic()
        batch, _ = self._in_flight.pop(done.step_id)
        if self.handover is not None:
            self.handover.mark_written(batch)
        logprobs = np.frombuffer(done.logprobs, dtype=np.float32).tolist() if done.logprobs else None
        tokens = np.frombuffer(done.tokens, dtype=np.int32).tolist()
        outputs = self.scheduler.finish_step(batch, tokens, logprobs, details_of(done))
        self._steps += 1
        self.trace.ended(now, self.epoch)
        if self._drained is not None and not self._in_flight and not self._drained.done():
            self._drained.set_result(None)
        self.pump()  # first: the stages compute while the results are told
        self._tell(outputs)

    def _tell(self, outputs: list[Output]) -> None:
        if not outputs:
            return
        self._generated_tokens += len(outputs)
        self._emit(
            c.Outputs(
                keys=[o.key for o in outputs],
                tokens=[-1 if o.token is None else o.token for o in outputs],
                finishes=["" if o.finish is None else o.finish.value for o in outputs],
                logprobs=[o.logprob for o in outputs],
                details={
                    i: c.Details(top=o.top, prompt=o.prompt, cached=o.cached)
                    for i, o in enumerate(outputs)
                    if o.top or o.prompt or o.cached is not None
                },
            )
        )

    # --- between two steps: what a handover needs ---

    async def drain_steps(self) -> None:
        """Hold scheduling and return when no micro-batch is in flight."""
        self._holding = True
        if self._in_flight:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained
            self._drained = None

    def resume(self) -> None:
        """Schedule again, unless a recovery is under way: that resumes when it is done."""
        if self._recovery is None:
            self._holding = False
            self.pump()

    def record(self, target: Pipeline) -> None:
        """The commit point: from here on ``target`` is the layout in force."""
        self.pipeline = target
        self.epoch += 1

    def adopt(self) -> None:
        """Tell every worker its role under a new generation. Steps and messages of older ones are void."""
        self._generation += 1
        self._in_flight.clear()
        cores = self.boot.options.threads or usable_cores()
        stages = self.pipeline.granularity
        threads = threads_per_stage(num_stages=stages, threads=cores, per_device=self.boot.options.threads_per_device)
        specs = specs_of(self.pipeline, self.worker_of)
        self._workers = list(specs)
        self.scheduler.micro_batches = micro_batches_for(self.boot.options, num_stages=stages, cores=cores)
        for index in range(self.pool.size):
            spec = specs.get(index)
            # A worker without a stage has one thread, so that what it prepares stays out of the others' way.
            own = threads if spec is not None else 1
            self.pool.send(index, m.Adopt(generation=self._generation, spec=spec, threads=own))

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

    async def load_stages(self, indexes: list[int]) -> None:
        """Have these workers load the layers of their stage in the pipeline in force."""
        specs = specs_of(self.pipeline, self.worker_of)
        loop = asyncio.get_running_loop()
        waiting = []
        for index in indexes:
            self._loading[index] = loop.create_future()
            waiting.append(self._loading[index])
            self.pool.send(index, m.Prepare(handover=0, spec=specs[index]))
        await asyncio.gather(*waiting)

    async def start(self) -> None:
        """Load the first layout and begin to schedule.

        Raises:
            EngineFailed: A worker could not load its layers.
        """
        await self.load_stages(list(specs_of(self.pipeline, self.worker_of)))
        self.adopt()
        self.resume()

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
                self._last_words[report.worker] = report.reason
            case m.Prepared() if report.handover == 0:
                if report.done:
                    settle(self._loading.pop(report.worker, None), None)
            case m.Failed() if report.handover == 0:
                waiting = self._loading.pop(report.worker, None)
                if waiting is not None and not waiting.done():
                    waiting.set_exception(EngineFailed(report.reason))
            case m.Prepared() | m.Failed() | m.Copied() | m.Released():
                if self.handover is not None:
                    self.handover.on_report(report)

    def on_worker_death(self, index: int, reason: str) -> None:
        """Restart a worker that ended; if it carried a stage, compute again what was lost with it."""
        words = self._last_words.pop(index, "")
        reason = f"{reason}: {words}" if words else reason
        now = time.monotonic()
        self._deaths = [t for t in self._deaths if now - t < 60.0] + [now]
        if len(self._deaths) > 10 * self.pool.size:
            self.fail(f"workers keep dying: {reason}")
            return
        self.pool.restart(index)
        self.adapters.restarted(index)
        waiting = self._loading.pop(index, None)
        if waiting is not None and not waiting.done():
            waiting.set_exception(EngineFailed(reason))
        self.inquiries.forget(index)
        carried = index in specs_of(self.pipeline, self.worker_of)
        if carried:
            self._begin_recovery()
        if self.handover is not None:
            self.handover.worker_lost(index, reason)

    def _begin_recovery(self) -> None:
        self._holding = True
        self._generation += 1  # whatever is still under way is void
        self._in_flight.clear()
        self.scheduler.recompute_all()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self._recovery is not None:
            self._recovery.cancel()
        self._recovery = asyncio.get_running_loop().create_task(self._recover())

    async def _recover(self) -> None:
        """Load the stages again where they are missing (the others have nothing to do), then go on."""
        for attempt in range(3):
            try:
                await self.load_stages(list(specs_of(self.pipeline, self.worker_of)))
                break
            except EngineFailed as error:
                if attempt == 2:
                    self.fail(f"a stage cannot be loaded again: {error}")
                    return
        self.adopt()
        self._recovery = None
        if self.handover is None or not self.handover.holds_scheduling:
            self.resume()

    def fail(self, reason: str) -> None:
        """End the engine: the daemon starts another and goes on from its own copy of the requests."""
        if not self.failed.done():
            self.failed.set_result(reason)

    async def watch_for_hangs(self) -> None:
        """Kill stage workers that answer nothing while a step is overdue; their loss is then recovered as a crash."""
        deadline_s = self.boot.options.hang_deadline_s
        while True:
            await asyncio.sleep(min(deadline_s / 4, 1.0))
            if not self._in_flight or self._recovery is not None:
                continue
            oldest = min(dispatched for _, dispatched in self._in_flight.values())
            if time.monotonic() - oldest < deadline_s:
                continue
            answers = await asyncio.gather(*(self.inquiries.answers_within(index, 2.0) for index in self._workers))
            silent = [index for index, well in zip(self._workers, answers, strict=True) if not well]
            for index in silent or self._workers[:1]:
                self.pool.kill(index)

    @property
    def recovering(self) -> bool:
        return self._recovery is not None

    def take_ticket(self) -> int:
        """Return a number that names one question or piece of work."""
        return next(self._tickets)

    def counters(self) -> EngineCounters:
        scheduler, caches = self.scheduler, self.boot.options.prefix_caching
        return EngineCounters(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            kv_blocks_used=scheduler.kv_blocks_used,
            kv_blocks_capacity=scheduler.kv_capacity,
            kv_block_tokens=self.boot.limits.kv_block_tokens,
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated_tokens,
            preemptions_total=scheduler.preemptions,
            steps_total=self._steps,
            worker_restarts_total=self.pool.restarts,
            refactorings_total=self.refactorings,
            prefix_queried_tokens_total=scheduler.prefix_queries if caches else None,
            prefix_hit_tokens_total=scheduler.prefix_hits if caches else None,
            kv_blocks_cached=scheduler.kv_blocks_cached if caches else None,
            kv_device_bytes=self.boot.options.kv_device_bytes or None,
        )


def _int32(values: list[int]) -> bytes:
    return np.array(values, dtype=np.int32).tobytes()
