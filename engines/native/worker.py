"""A stage worker: a resident process that carries a stage, or waits for one.

Its one loop reads the inbox and blocks when there is nothing to do. Work for a handover comes in small pieces: each
message is bounded (KV copies by ``slice_bytes``), longer work is cut into slices of which one runs after each step or
whenever the inbox is empty. Reading weights happens in a thread that spends its time inside the kernel.
"""

import ctypes
import os
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import assert_never

import numpy as np
import torch

from engines.failpoints import FailAction, FailpointHit, Failpoints
from engines.native import messages as m
from engines.native.adapter_loading import AdapterLoading
from engines.native.compute import IN_PLACE, open_compute
from engines.native.context import WorkerContext, kv_store_of
from engines.native.kv_bound import KvBound
from engines.native.layer_source import ReadLayer
from engines.native.stage import HeldLayers, StageRunner
from engines.native.trace import StageTrace
from engines.native.weights import WeightFiles
from engines.parameters.client import ParameterClient
from engines.process import die_with_parent

_LOADING_NICE = 19  # steps come first
_OFFERING = -1  # in place of the number of a handover
_THREAD_SWITCH_S = 0.0005  # so that the loading thread's bits of Python never hold a step up for long


class _LoadJob:
    """Layers on their way in, for a handover or (number 0) for a start or a recovery."""

    def __init__(self, *, handover: int, spec: m.StageSpec, missing: list[str]) -> None:
        self.handover = handover
        self.spec = spec
        self.missing = missing
        self.read: dict[str, ReadLayer] = {}  # filled by the thread
        self.cancelled = threading.Event()
        self._changing = threading.Lock()

    def take_in(self, layer: str, read: ReadLayer) -> bool:
        """Keep what was read; False: it is not wanted any more."""
        with self._changing:
            if not self.cancelled.is_set():
                self.read[layer] = read
            return not self.cancelled.is_set()

    def cancel(self) -> list[ReadLayer]:
        """Have the thread stop; return what was read and nobody will attach."""
        with self._changing:
            self.cancelled.set()
            read, self.read = self.read, {}
            return list(read.values())


class Worker:
    """The state of one worker process."""

    def __init__(self, index: int, context: WorkerContext) -> None:
        family = context.family
        self._index = index
        self._context = context
        self._inbox = context.inboxes[index]
        self._compute = open_compute(context.visible[index] if context.visible else IN_PLACE)
        if self._compute.own_memory:
            family.move_to(self._compute.device)
            context.lora.move_to(self._compute.device)
        self._kv = kv_store_of(family, context.shared, self._compute, num_slots=context.num_slots)
        size = context.kv_block_tokens
        self._kv_bound = KvBound(self._kv, kv_block_tokens=size, end_slot=context.shared.kv_end_slot)
        self._weights = WeightFiles(context.checkpoint, dtype=family.dtype)
        names = context.checkpoint.tensors
        parameters = ParameterClient(context.parameters, of=str(context.checkpoint.directory))
        self._layers = HeldLayers(family, self._weights, self._kv, names, compute=self._compute, parameters=parameters)
        self._runner = StageRunner(
            family,
            self._kv,
            shared=context.shared,
            kv_block_tokens=size,
            compute=self._compute,
            lora=context.lora,
        )
        self._adapters = AdapterLoading(
            context.lora,
            family,
            worker=index,
            tell_itself=lambda message: self._inbox.send(m.encode(message)),
            report=self._send,
        )
        self._failpoints = Failpoints()
        self._spec: m.StageSpec | None = None
        self._generation = 0
        self._steps: dict[int, m.RunStep] = {}
        self._hidden: dict[int, m.Hidden] = {}
        self._slices: deque[tuple[int, Callable[[], None]]] = deque()  # (handover, piece of work)
        self._load_job: _LoadJob | None = None
        self._busy_s = 0.0
        self._trace = StageTrace()
        self._longest_slice_s = 0.0

    def run(self) -> None:
        """Serve until told to exit."""
        with torch.inference_mode():
            self._warm_up()
            while True:
                raw = self._inbox.receive_now() if self._slices else self._inbox.receive()
                if raw is None:
                    self._run_slice()
                    continue
                message = m.decode_command(raw)
                if isinstance(message, m.Exit):
                    return
                self._handle(message)

    def _warm_up(self) -> None:
        """Run a decoder once: the first use of torch in a process takes long, and must not fall into a handover."""
        self._layers.attach("0", self._layers.read("0", keep=False))
        self._runner.warm_up("0")
        self._layers.drop("0")

    def _handle(self, message: m.WorkerCommand) -> None:
        match message:
            case m.RunStep():
                if message.generation == self._generation:
                    self._steps[message.step_id] = message
                    self._run_ready(message.step_id)
            case m.Hidden():
                if message.generation == self._generation:
                    self._hidden[message.step_id] = message
                    self._run_ready(message.step_id)
            case m.Prepare():
                self._prepare(message)
            case m.Loaded():
                if self._load_job is not None and self._load_job.handover == message.handover:
                    self._plan_attaching(self._load_job)
            case m.CopyOut() | m.CopyIn():
                copy = (
                    partial(self._copy_out, message)
                    if isinstance(message, m.CopyOut)
                    else partial(self._copy_in, message)
                )
                self._try(message.handover, copy)
            case m.Release():
                self._try(message.handover, partial(self._plan_release, message.handover))
            case m.MoveKv() | m.BoundKv():
                self._change_kv(message)
            case m.LoadAdapter() | m.AdapterRead() | m.DropAdapter():
                self._adapters.handle(message)
            case m.Adopt():
                self._adopt(message)
            case m.ReadStats() | m.ReadSteps() | m.Checksum():
                self._answer(message)
            case m.KeepAt() | m.ArmFailpoint():
                self._take_note(message)
            case m.Exit():
                raise AssertionError("handled by the loop")
            case _:
                assert_never(message)

    # --- steps ---

    def _run_ready(self, step_id: int) -> None:
        """Run a micro-batch once both its description and its hidden states are here."""
        spec = self._spec
        if spec is None or step_id not in self._steps or not (spec.is_first or step_id in self._hidden):
            return
        started = time.perf_counter()
        self._failpoints.hit("worker.step")
        message = self._steps.pop(step_id)
        hidden, step = self._runner.forward(spec, message, self._incoming(message))
        if spec.is_last:
            forwarded = time.perf_counter()
            sampled = self._runner.sample(message, hidden, step)
            self._trace.sampled(time.perf_counter() - forwarded)
            self._send(
                m.StepDone(
                    worker=self._index,
                    step_id=step_id,
                    generation=message.generation,
                    tokens=sampled.tokens,
                    logprobs=sampled.logprobs,
                    tops=sampled.tops,
                    scores=sampled.scores,
                )
            )
        else:
            self._pass_on(spec.next_worker, message, hidden)
        busy_s = time.perf_counter() - started
        self._busy_s += busy_s
        self._trace.computed(message.starts, message.counts, busy_s)
        if self._slices:
            self._run_slice()

    def _incoming(self, message: m.RunStep) -> torch.Tensor | None:
        arrived = self._hidden.pop(message.step_id, None)
        if arrived is None:
            return None
        family = self._context.family
        outbox = self._context.shared.outbox(arrived.source, message.step_id)
        count = sum(np.frombuffer(message.counts, dtype=np.int32).tolist())
        flat = torch.frombuffer(outbox, dtype=family.dtype, count=count * family.hidden_size)
        return flat.view(1, count, family.hidden_size)

    def _pass_on(self, target: int, message: m.RunStep, hidden: torch.Tensor) -> None:
        outbox = self._context.shared.outbox(self._index, message.step_id)
        torch.frombuffer(outbox, dtype=hidden.dtype, count=hidden.numel()).copy_(hidden.view(-1))
        note = m.Hidden(step_id=message.step_id, generation=message.generation, source=self._index)
        self._context.inboxes[target].send(m.encode(note))

    # --- handover ---

    def _prepare(self, message: m.Prepare) -> None:
        """Begin to load what the future role needs and this worker lacks; the thread reports to this inbox."""
        if self._load_job is not None:
            self._cancel_loading(self._load_job)
        missing = [layer for layer in message.spec.layers() if layer not in self._layers.held]
        self._load_job = _LoadJob(handover=message.handover, spec=message.spec, missing=missing)
        threading.Thread(target=self._load, args=(self._load_job,), daemon=True).start()

    def _load(self, job: _LoadJob) -> None:
        """In a thread: map the weights and fault them in. Hardly any Python runs here."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOADING_NICE)  # of this thread alone
        done_bytes = 0
        try:
            self._failpoints.hit("worker.load")
            for layer in job.missing:
                read = self._layers.read(layer, cancelled=job.cancelled)
                done_bytes += read.num_bytes
                if not job.take_in(layer, read):
                    self._layers.discard(read)
                    return
                self._report_prepared(job.handover, done_bytes, done=False)
        except (FailpointHit, OSError, KeyError, ValueError, RuntimeError) as error:
            self._send(m.Failed(worker=self._index, handover=job.handover, reason=f"loading failed: {error}"))
            return
        self._inbox.send(m.encode(m.Loaded(handover=job.handover)))

    def _cancel_loading(self, job: _LoadJob) -> None:
        for read in job.cancel():
            self._layers.discard(read)
        self._slices = deque(entry for entry in self._slices if entry[0] != job.handover)
        self._load_job = None

    def _plan_attaching(self, job: _LoadJob) -> None:
        for layer in job.read:
            self._slices.append((job.handover, partial(self._attach, job, layer)))
            self._slices.append((job.handover, partial(self._runner.warm_up, layer)))
        self._slices.append((job.handover, partial(self._report_prepared, job.handover, -1, done=True)))

    def _attach(self, job: _LoadJob, layer: str) -> None:
        self._layers.attach(layer, job.read.pop(layer))  # else whoever drops it would not have let go of it

    def _report_prepared(self, handover: int, weights_bytes: int, *, done: bool) -> None:
        if done:
            self._failpoints.hit("worker.prepared")
        self._send(m.Prepared(worker=self._index, handover=handover, weights_bytes=weights_bytes, done=done))

    def _copy_out(self, message: m.CopyOut) -> None:
        if self._failpoints.hit("worker.copy_out"):
            self._send(m.Copied(worker=self._index, handover=message.handover, ticket=message.ticket, busy_s=0.0))
            return
        started = time.thread_time()
        slots = np.frombuffer(message.slots, dtype=np.int32)
        self._kv.read_into(message.decoders, slots, self._context.shared.staging(self._index, message.buffer))
        note = m.CopyIn(
            handover=message.handover,
            ticket=message.ticket,
            source=self._index,
            buffer=message.buffer,
            decoders=message.decoders,
            slots=message.slots,
            busy_s=time.thread_time() - started,
        )
        self._context.inboxes[message.target].send(m.encode(note))

    def _copy_in(self, message: m.CopyIn) -> None:
        if self._load_job is None or self._load_job.handover != message.handover:  # rolled back meanwhile
            return
        self._failpoints.hit("worker.copy_in")
        started = time.thread_time()
        slots = np.frombuffer(message.slots, dtype=np.int32)
        self._kv.write_from(message.decoders, slots, self._context.shared.staging(message.source, message.buffer))
        busy_s = message.busy_s + time.thread_time() - started
        self._send(m.Copied(worker=self._index, handover=message.handover, ticket=message.ticket, busy_s=busy_s))

    def _adopt(self, message: m.Adopt) -> None:
        self._failpoints.hit("worker.adopt")
        self._generation = message.generation
        self._spec = message.spec
        self._steps.clear()
        self._hidden.clear()
        self._trace = StageTrace()  # what came before was another stage
        self._context.family.set_threads(message.threads)

    def _plan_release(self, handover: int) -> None:
        """Drop, layer by layer, whatever no role needs: the same for retire and roll back."""
        self._failpoints.hit("worker.release")
        job = self._load_job
        if job is not None and job.handover == handover:
            self._cancel_loading(job)
            job = None
        roles = [spec for spec in (self._spec, job.spec if job is not None else None) if spec is not None]
        wanted = {layer for spec in roles for layer in spec.layers()}
        returned = [0, 0]

        def drop(layer: str) -> None:
            weights_bytes, kv_bytes = self._layers.drop(layer)
            returned[0] += weights_bytes
            returned[1] += kv_bytes

        def report() -> None:
            _trim_heap()
            self._compute.give_back()
            self._send(
                m.Released(worker=self._index, handover=handover, weights_bytes=returned[0], kv_bytes=returned[1])
            )

        for layer in sorted(self._layers.held - wanted):
            self._slices.append((handover, partial(drop, layer)))
        self._slices.append((handover, report))

    def _change_kv(self, message: m.MoveKv | m.BoundKv) -> None:
        if isinstance(message, m.BoundKv):
            held = sorted(int(layer) for layer in self._layers.held if layer.isdigit())
            tell = partial(self._report_bound, message.ticket)
            self._slices.extend((message.ticket, piece) for piece in self._kv_bound.slices(message, held, tell=tell))
        elif self._spec is not None:
            self._kv_bound.move(message, range(self._spec.first_decoder, self._spec.end_decoder))

    def _report_bound(self, ticket: int, returned_bytes: int) -> None:
        self._compute.give_back()
        self._send(m.KvBounded(worker=self._index, ticket=ticket, returned_bytes=returned_bytes))

    def _try(self, handover: int, work: Callable[[], None]) -> None:
        """Do a piece of a handover; if it fails, the handover fails and the worker goes on."""
        try:
            work()
        except (FailpointHit, OSError, KeyError, ValueError, RuntimeError) as error:
            self._slices = deque(entry for entry in self._slices if entry[0] != handover)
            self._send(m.Failed(worker=self._index, handover=handover, reason=f"{type(error).__name__}: {error}"))

    def _run_slice(self) -> None:
        started = time.thread_time()
        self._try(*self._slices.popleft())
        self._longest_slice_s = max(self._longest_slice_s, time.thread_time() - started)

    # --- the rest ---

    def _keep_at(self, address: str) -> None:
        """Turn to another keeper; it is offered the layers one by one, between steps."""
        self._layers.keep_at(address)
        self._slices += [(_OFFERING, partial(self._layers.offer, layer)) for layer in sorted(self._layers.held)]

    def _checksums(self, message: m.Checksum) -> list[int]:
        size = self._context.kv_block_tokens
        return [
            zlib.crc32(self._kv.slot_bytes(decoder, block * size, block * size + valid))
            for decoder in message.decoders
            for block, valid in message.blocks
        ]

    def _answer(self, question: m.ReadStats | m.ReadSteps | m.Checksum) -> None:
        match question:
            case m.ReadSteps():
                self._send_steps(question.ticket)
            case m.ReadStats():
                self._send_stats(question.ticket)
            case m.Checksum():
                values = self._checksums(question)
                self._send(m.Checksums(worker=self._index, ticket=question.ticket, values=values))

    def _send_stats(self, ticket: int) -> None:
        self._send(
            m.Stats(
                worker=self._index,
                ticket=ticket,
                weights_bytes=self._layers.weights_bytes,
                kv_mapped_bytes=self._layers.kv_mapped_bytes(),
                busy_s=self._busy_s,
                longest_slice_s=self._longest_slice_s,
            )
        )

    def _send_steps(self, ticket: int) -> None:
        parts_s = self._trace.parts_s() | self._context.family.parts_s()
        tokens, sequences, context, busy_s = self._trace.take()
        self._send(
            m.Steps(
                worker=self._index,
                ticket=ticket,
                tokens=tokens,
                sequences=sequences,
                context=context,
                busy_s=busy_s,
                parts_s=parts_s,
            )
        )

    def _take_note(self, message: m.KeepAt | m.ArmFailpoint) -> None:
        match message:
            case m.KeepAt():
                self._keep_at(message.address)
            case m.ArmFailpoint() if message.name:
                self._failpoints.arm(message.name, FailAction(message.action))
            case m.ArmFailpoint():
                self._failpoints.disarm()

    def _send(self, report: m.WorkerReport) -> None:
        self._context.core_inbox.send(m.encode(report))


def worker_main(index: int, context: WorkerContext, *, core_pid: int) -> int:
    """Run a worker in a process that has just been forked; return its exit status."""
    die_with_parent(parent_pid=core_pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    os.nice(context.nice)
    sys.setswitchinterval(_THREAD_SWITCH_S)
    torch.set_num_threads(1)
    try:
        Worker(index, context).run()
    except (FailpointHit, OSError, KeyError, ValueError, RuntimeError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}"
        context.core_inbox.send(m.encode(m.Crashed(worker=index, reason=reason)))
        return 1
    return 0


def _trim_heap() -> None:
    """Have the C library give freed heap pages back (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
