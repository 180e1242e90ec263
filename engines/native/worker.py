"""A stage worker: carries a stage, or waits for one.

Its one loop reads the inbox and blocks when there is nothing to do. Work for a handover comes in small pieces: each
message is bounded (KV copies by ``slice_bytes``), longer work is cut into slices of which one runs after each step or
whenever the inbox is empty. Weights are read in a thread.
"""

import time
from functools import partial
from typing import assert_never

import numpy as np
import torch

from engines.failpoints import FailAction, Failpoints
from engines.native import messages as m
from engines.native.adapter_loading import AdapterLoading
from engines.native.compute import IN_PLACE, open_compute
from engines.native.context import WorkerContext, kv_store_of
from engines.native.kv_bound import KvBound
from engines.native.kv_copying import KvCopying, checksums_of
from engines.native.layer_loading import LayerLoading
from engines.native.slices import Slices
from engines.native.stage import HeldLayers, StageRunner
from engines.native.trace import StageTrace
from engines.native.weights import WeightFiles
from engines.parameters.client import ParameterClient
from engines.process import trim_heap

_OFFERING = -1  # in place of the number of a handover


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
            for area in context.shared.areas:
                self._compute.pin(area)
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
        self._failpoints = Failpoints()
        self._adapters = AdapterLoading(
            context.lora,
            family,
            self._failpoints,
            worker=index,
            tell_itself=lambda message: self._inbox.send(m.encode(message)),
            report=self._send,
        )
        self._slices = Slices(worker=index, report=self._send)
        self._loading = LayerLoading(
            self._layers,
            self._runner,
            self._slices,
            self._failpoints,
            worker=index,
            tell_itself=lambda message: self._inbox.send(m.encode(message)),
            report=self._send,
        )
        self._copying = KvCopying(
            self._kv,
            context.shared,
            self._failpoints,
            worker=index,
            tell=lambda other, message: context.inboxes[other].send(m.encode(message)),
            report=self._send,
        )
        self._spec: m.StageSpec | None = None
        self._generation = 0
        self._steps: dict[int, m.RunStep] = {}
        self._hidden: dict[int, m.Hidden] = {}
        self._busy_s = 0.0
        self._trace = StageTrace()

    def run(self) -> None:
        """Serve until told to exit."""
        with torch.inference_mode():
            self._warm_up()
            while True:
                raw = self._inbox.receive_now() if self._slices.are_waiting else self._inbox.receive()
                if raw is None:
                    self._slices.run_one()
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
                self._loading.begin(message)
            case m.Loaded():
                self._loading.attach(message.handover)
            case m.CopyOut() | m.CopyIn():
                self._slices.attempt(message.handover, partial(self._copy, message))
            case m.Release():
                self._slices.attempt(message.handover, partial(self._plan_release, message.handover))
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
        if self._slices.are_waiting:
            self._slices.run_one()

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

    def _copy(self, message: m.CopyOut | m.CopyIn) -> None:
        if isinstance(message, m.CopyOut):
            self._copying.copy_out(message)
        elif self._loading.is_for(message.handover):  # else it was rolled back meanwhile
            self._copying.copy_in(message)

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
        self._loading.cancel(handover)
        roles = [spec for spec in (self._spec, self._loading.spec) if spec is not None]
        wanted = {layer for spec in roles for layer in spec.layers()}
        returned = [0, 0]

        def drop(layer: str) -> None:
            weights_bytes, kv_bytes = self._layers.drop(layer)
            returned[0] += weights_bytes
            returned[1] += kv_bytes

        def report() -> None:
            trim_heap()
            self._compute.give_back()
            self._send(
                m.Released(worker=self._index, handover=handover, weights_bytes=returned[0], kv_bytes=returned[1])
            )

        self._slices.add(handover, [partial(drop, layer) for layer in sorted(self._layers.held - wanted)])
        self._slices.add(handover, [report])

    def _change_kv(self, message: m.MoveKv | m.BoundKv) -> None:
        if isinstance(message, m.BoundKv):
            held = sorted(int(layer) for layer in self._layers.held if layer.isdigit())
            tell = partial(self._report_bound, message.ticket)
            slices = self._kv_bound.slices(message, held, tell=tell)
            self._slices.add(message.ticket, [self._begin_bound, *slices])
        elif self._spec is not None:
            self._kv_bound.move(message, range(self._spec.first_decoder, self._spec.end_decoder))

    def _begin_bound(self) -> None:
        self._failpoints.hit("worker.bound")

    def _report_bound(self, ticket: int, returned_bytes: int) -> None:
        self._compute.give_back()
        self._send(m.KvBounded(worker=self._index, ticket=ticket, returned_bytes=returned_bytes))

    # --- the rest ---

    def _keep_at(self, address: str) -> None:
        """Turn to another keeper; it is offered the layers one by one, between steps."""
        self._layers.keep_at(address)
        self._slices.add(_OFFERING, [partial(self._layers.offer, layer) for layer in sorted(self._layers.held)])

    def _answer(self, question: m.ReadStats | m.ReadSteps | m.Checksum) -> None:
        match question:
            case m.ReadSteps():
                self._send_steps(question.ticket)
            case m.ReadStats():
                self._send_stats(question.ticket)
            case m.Checksum():
                values = checksums_of(self._kv, question, kv_block_tokens=self._context.kv_block_tokens)
                self._send(m.Checksums(worker=self._index, ticket=question.ticket, values=values))

    def _send_stats(self, ticket: int) -> None:
        self._send(
            m.Stats(
                worker=self._index,
                ticket=ticket,
                weights_bytes=self._layers.weights_bytes,
                kv_mapped_bytes=self._layers.kv_mapped_bytes(),
                busy_s=self._busy_s,
                longest_slice_s=self._slices.longest_s,
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
