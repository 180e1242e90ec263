"""One scheduler process as a resident rank: layers and their KV caches come and go while steps run.

Three threads touch it. SGLang's own runs steps, and between them the commands that reach all ranks at the same slot.
The side channel's prepares and releases what no step sees. The receiver's copies KV blocks into caches that no step
reads yet.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from flexpiped_served.answering import EXPECTED, RankAnswers
from flexpiped_served.failpoints import Failpoints
from flexpiped_served.finding import CannotMove
from flexpiped_served.moving import Moving
from flexpiped_served.side import Reply, SideChannel
from flexpiped_served.weights import WeightHelper

from flexpiped_sglang import internals
from flexpiped_sglang.answers import Answer, AnswerReceiver, AnswerSender
from flexpiped_sglang.attributes import OF_ALLOCATOR, OF_PARALLEL, OF_POOL, OF_SCHEDULER, refusal_without
from flexpiped_sglang.conductor import Conductor
from flexpiped_sglang.counting import Counting, Uncounted
from flexpiped_sglang.layers import LayerStore
from flexpiped_sglang.optional import has
from flexpiped_sglang.sending import Sending
from flexpiped_sglang.settings import Settings
from flexpiped_sglang.slots import Command, Slots
from flexpiped_sglang.starting import kept_by, kept_layers

_HANDOVER_CALLS = ("flexpiped_begin", "flexpiped_round", "flexpiped_commit")
_SWITCH_S = 0.0005  # so that a thread's bits of Python never hold a step up for long


class Rank:
    """Added to one scheduler when it is ready. Without a refusal it can gain and lose layers."""

    def __init__(self, scheduler: Any, settings: Settings, *, resumes_seeded: bool) -> None:
        sys.setswitchinterval(_SWITCH_S)
        self._scheduler = scheduler
        self._settings = settings
        self._resumes_seeded = resumes_seeded
        self._busy_s = 0.0
        self._epoch = 0
        self._failpoints = Failpoints()
        parallel = internals.get_parallel()
        self._number = parallel.pp_rank * parallel.tp_size + parallel.tp_rank
        self._answers = AnswerSender(settings.directory, self._number)
        self._refusal = internals.check() or _odd(scheduler, parallel) or internals.refusal_of(scheduler)
        self._moving: Moving | None = None
        self._sending: Sending | None = None
        self._conductor: Conductor | None = None
        if not self._refusal:
            self._make_movable(parallel)
        has(self._watch_steps, without="how busy ranks are is not known")
        if not internals.check():
            self._slots = Slots(
                scheduler,
                before_slot=self._before_slot,
                on_command=self._on_command,
                on_slot=self._on_slot,
                no_batch=internals.no_batch,
                would_run=partial(internals.would_run, scheduler),
            )
        if self._number == 0:
            self._lead(parallel)
        answers = RankAnswers(self._failpoints, moving=self._ready_moving, status=self._status, no_grad=torch.no_grad)
        self._side = SideChannel(settings.directory / f"rank-{self._number}.sock", answers.answer)

    # --- start ---

    def _make_movable(self, parallel: Any) -> None:
        scheduler, directory = self._scheduler, self._settings.directory
        runner, allocator = scheduler.tp_worker.model_runner, scheduler.token_to_kv_pool_allocator
        pool = allocator.get_kvcache()
        self._refusal = refusal_without(allocator, OF_ALLOCATOR) or refusal_without(pool, OF_POOL)
        if self._refusal:
            return
        try:
            layers = LayerStore(runner.model, pool)
        except CannotMove as error:
            self._refusal = str(error)
            return
        of = (runner.model, layers.made, layers.core, runner.loader, scheduler.model_config)
        helper = WeightHelper(kept_by(runner.loader) or kept_layers(self._settings, *of), let_go=layers.let_go)
        self._moving = Moving(
            layers=layers,
            helper=helper,
            failpoints=self._failpoints,
            directory=directory,
            rank=self._number,
            stage=parallel.pp_rank,
            group_size=parallel.tp_size,
            group_rank=parallel.tp_rank,
            num_blocks=pool.size // pool.page_size + 1,
            slice_bytes=self._settings.slice_bytes,
        )
        self._sending = Sending(self._moving, allocator, directory=directory, rank=self._number, stage=parallel.pp_rank)

    def _lead(self, parallel: Any) -> None:
        """Begin to answer for all ranks: this is the first."""
        self._counting: Counting | Uncounted = Uncounted(self._scheduler)
        has(self._count, without="what its scheduler does is not counted")
        if not internals.check():
            num_layers = self._scheduler.model_config.num_hidden_layers
            self._conductor = Conductor(
                self._slots,
                layout=_layout(num_layers, parallel.pp_size),
                stages=parallel.pp_size,
                group=parallel.tp_size,
                # A batch's results are in one slot before its turn comes again. Without pipeline parallelism there is
                # one micro-batch, whose results may be processed a slot later.
                drain_slots=max(2, parallel.pp_size + parallel.pp_async_batch_depth),
                failpoints=self._failpoints,
            )
            self._receiver = AnswerReceiver(self._settings.directory, self._conductor.on_answer)
        core = self._settings.directory / "engine.sock"
        self._core = SideChannel(core, self._answer_core, greeting=self._ready)

    def _count(self) -> None:
        self._counting = Counting(self._scheduler)

    def _watch_steps(self) -> None:
        """Be told of each batch: just before it runs, and when its results are in."""
        run, process = self._scheduler.run_batch, self._scheduler.process_batch_result

        @wraps(run)
        def run_batch(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if self._sending is not None:
                self._sending.mark(batch.out_cache_loc)
            if self._conductor is not None:
                self._conductor.dispatched()
            started = time.perf_counter()
            result = run(batch, *args, **kwargs)
            self._busy_s += time.perf_counter() - started
            return result

        @wraps(process)
        def process_batch_result(*args: Any, **kwargs: Any) -> Any:
            answer = process(*args, **kwargs)
            if self._conductor is not None:
                self._conductor.ended()
            return answer

        self._scheduler.run_batch, self._scheduler.process_batch_result = run_batch, process_batch_result

    # --- in each slot, between two steps ---

    def _before_slot(self) -> None:
        if self._conductor is not None:
            self._conductor.on_slot()

    def _on_slot(self) -> None:
        if self._sending is not None:
            self._sending.pump()

    def _on_command(self, command: Command) -> None:
        match command:
            case ("hold", holder):
                self._slots.held_by.add(holder)
            case ("release", holder):
                self._slots.held_by.discard(holder)
            case ("begin", number, layout, new_layout):
                self._ready_sending().begin(number, layout, new_layout)
            case ("abandon", number):
                self._ready_sending().abandon(number)
            case ("round", ticket, number):
                self._begin_round(ticket, number)
            case ("commit_copy", ticket, number, deadline_s):
                self._try(ticket, lambda sending: sending.commit_copy(number, deadline_s))
            case ("checksums", ticket, number):
                self._try(ticket, lambda sending: sending.checksums(number))
            case ("switch", ticket, number, epoch, holder):
                self._try(ticket, lambda sending: self._switch(sending, number, epoch, holder))

    def _begin_round(self, ticket: int, number: int) -> None:
        try:
            self._ready_sending().begin_round(number, partial(self._answers.send, ticket))
        except EXPECTED as error:
            self._answers.send(ticket, {"error": _words(error)})

    def _switch(self, sending: Sending, number: int, epoch: int, holder: str) -> Answer:
        """Switch and let batches run again: those of this slot are the first. A rank that fails lets none pass."""
        answer = sending.switch(number)
        self._epoch = epoch
        self._slots.held_by.discard(holder)
        return answer | {"slot": self._slots.number}

    def _try(self, ticket: int, work: Callable[[Sending], Answer]) -> None:
        """Do a piece of a handover and answer. An exception would end the scheduler, so it becomes an answer."""
        try:
            answer = work(self._ready_sending())
        except EXPECTED as error:
            answer = {"error": _words(error)}
        self._answers.send(ticket, answer)

    def _ready_sending(self) -> Sending:
        if self._sending is None:
            raise RuntimeError(self._refusal)
        return self._sending

    # --- the side channels' threads ---

    def _answer_core(self, message: dict[str, Any], reply: Reply) -> None:
        call, method = message["call"], message["method"]
        if method == "flexpiped_counters":
            reply({"op": "reply", "call": call, "result": self._counting.counters()})
        elif self._conductor is None or (self._moving is None and method in _HANDOVER_CALLS):
            reply({"op": "reply", "call": call, "error": self._refusal})
        else:
            self._conductor.take(method, message.get("args", []), reply, call)

    def _ready_moving(self) -> Moving:
        if self._moving is None:
            raise RuntimeError(self._refusal)
        return self._moving

    def _status(self) -> dict[str, Any]:
        parallel = internals.get_parallel()
        status: dict[str, Any] = {
            "pid": os.getpid(),
            "helper_pids": [] if self._moving is None else [self._moving.helper_pid],
            "pp_rank": parallel.pp_rank,
            "tp_rank": parallel.tp_rank,
            "busy_s": self._busy_s,
            "epoch": self._epoch,
            "runs": "",
        }
        return status | (self._holds() if self._moving is None else self._moving.status())

    def _holds(self) -> dict[str, Any]:
        """Return what a rank holds whose layers stay."""
        kv = self._scheduler.token_to_kv_pool_allocator.get_kvcache().get_kv_size_bytes()  # keys and values, or both
        parameters = self._scheduler.tp_worker.model_runner.model.parameters()
        return {
            "layers": [],
            "weights_bytes": sum(each.numel() * each.element_size() for each in parameters),
            "kv_mapped_bytes": int(sum(kv) if isinstance(kv, tuple) else kv),
        }

    def _ready(self) -> dict[str, Any]:
        scheduler, config, parallel = self._scheduler, self._scheduler.model_config, internals.get_parallel()
        page = int(scheduler.page_size)
        return {
            "op": "ready",
            "version": internals.VERSION,
            "vocab_size": int(config.vocab_size),
            # SGLang keeps some of the context for itself: the longest prompt and output that it takes
            "max_model_len": int(scheduler.max_req_input_len),
            "eos_token_ids": sorted(config.hf_eos_token_id or ()),
            "pp_size": parallel.pp_size,
            "tp_size": parallel.tp_size,
            "refactor_refusal": self._refusal,
            "generates": bool(getattr(scheduler, "is_generation", True)),
            "resumes_seeded": self._resumes_seeded,
            "kv_form": "",
            "kv_refusal": "KV caches of single requests do not leave SGLang",
            "num_kv_blocks": int(scheduler.max_total_num_tokens) // page,
            "kv_block_tokens": page,
            "layout": [] if self._conductor is None else self._conductor.layout,
        }


def _odd(scheduler: Any, parallel: Any) -> str:
    return refusal_without(scheduler, OF_SCHEDULER) or refusal_without(parallel, OF_PARALLEL)


def _layout(num_layers: int, pp_size: int) -> list[int]:
    """Return the pipeline rank of each layer, as SGLang divides them at start."""
    ranges = [internals.get_pp_indices(num_layers, rank, pp_size) for rank in range(pp_size)]
    return [rank for rank, (first, end) in enumerate(ranges) for _ in range(first, end)]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
