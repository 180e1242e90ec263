"""What the engine core does for a handover: mark what steps write, feed the copies, commit between two steps.

``Conductor`` lives in vLLM's ``EngineCore``, whose utility calls run between two steps. Copies go out without a reply
through the queue that carries the steps, so each is made after the steps that were dispatched before it and before
those that come later; the destinations acknowledge by datagram, and the next copies follow.
"""

import json
import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from flexpiped_served.copy_round import CopyRound
from flexpiped_served.failpoints import Failpoints
from flexpiped_served.pieces import pieces_of
from flexpiped_served.staging import bind_datagram

from flexpiped_vllm import internals
from flexpiped_vllm.kv_tracker import KVTracker
from flexpiped_vllm.kv_transfers import KvTransfers
from flexpiped_vllm.settings import Settings
from flexpiped_vllm.steps import StepWatch

_NO_REPLY = -1000  # no rank has this number, so none answers
_PATIENCE = 2.0  # times the deadline that ranks keep themselves
_RECEIVE_BYTES = 1 << 16


@dataclass(slots=True)
class _Handover:
    number: int
    layout: list[int]
    new_layout: list[int]
    tracker: KVTracker
    round: CopyRound | None = None

    @property
    def participants(self) -> list[int]:
        """Pipeline ranks that gain or lose a layer."""
        changed = ({old, new} for old, new in zip(self.layout, self.new_layout, strict=True) if old != new)
        return sorted(set().union(*changed))


class Conductor:
    """Added to one engine core. All but the thread that reads acknowledgements runs in the core's main thread."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._epoch = 0
        self._failpoints = Failpoints()
        self._handover: _Handover | None = None
        self._last_number = 0  # of all handovers
        self._crash = ""  # what a commit has answered that leaves the ranks in doubt
        self._answers: deque[tuple[int, int, int, str]] = deque()  # appended by the thread, taken by the main one
        self._ranks: list[dict[str, Any]] = core.model_executor.collective_rpc("flexpiped_describe")
        self._tp = core.vllm_config.parallel_config.tensor_parallel_size
        self._block_tokens = int(core.vllm_config.cache_config.block_size)
        self._steps = StepWatch(core.scheduler, epoch=lambda: self._epoch, before_dispatch=self._mark)
        settings = Settings.of_environment()
        self.kv = KvTransfers(core, ranks=self._ranks, directory=settings.directory, slice_bytes=settings.slice_bytes)
        self._socket = bind_datagram(settings.directory / "core.dgram")
        threading.Thread(target=self._read_answers, name="flexpiped-answers", daemon=True).start()

    # --- observing ---

    def info(self) -> dict[str, Any]:
        refusals = [rank["refusal"] for rank in self._ranks if rank["refusal"]]
        pool = self._core.scheduler.kv_cache_manager.block_pool
        return {
            "core_pid": os.getpid(),
            "worker_pids": [rank["pid"] for rank in self._ranks],
            "helper_pids": [pid for rank in self._ranks for pid in rank["helper_pids"]],
            "refactor_refusal": refusals[0] if refusals else "",
            "kv_form": self.kv.form,
            "kv_refusal": self.kv.refusal,
            "kv_by_nixl": self.kv.by_nixl,
            "num_kv_blocks": pool.num_gpu_blocks,
            "block_tokens": self._block_tokens,
            "layout": self._layout(),
            "vllm_version": internals.VERSION,
        }

    def counters(self) -> dict[str, Any]:
        scheduler = self._core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        capacity = pool.num_gpu_blocks - 1  # one is vLLM's null block
        free = pool.get_num_free_blocks()
        return {
            "running": len(scheduler.running),
            "waiting": scheduler.get_num_unfinished_requests() - len(scheduler.running),
            "kv_blocks_used": capacity - free,
            "kv_blocks_capacity": capacity,
            "kv_block_tokens": self._block_tokens,
            **self._steps.totals,
        }

    def trace(self) -> dict[str, Any]:
        return self._steps.take_trace()

    # --- the handover ---

    def begin(self, number: int, new_layout: list[int]) -> dict[str, Any]:
        """Begin to mark what steps write; everything live counts as written."""
        self._failpoints.hit("core.begin")
        self._last_number = number
        self._handover = _Handover(number, self._layout(), list(new_layout), KVTracker(self._live()))
        return {"live_blocks": self._handover.tracker.count}

    def round(self, number: int) -> "Future[dict[str, Any]]":
        """Copy what was written since the last round; the future is done when all destinations have it."""
        handover = self._of(number)
        self._failpoints.hit("core.round")
        blocks = handover.tracker.take(self._live())
        cuts = {
            stage: list(pieces_of(self._targets(handover, stage), blocks, **self._sizes()))
            for stage in sorted(set(handover.layout))
        }
        handover.round = CopyRound(
            {stage: cut for stage, cut in cuts.items() if cut},
            sent_blocks=len(blocks),
            degree=self._tp,
            block_bytes=self._sizes()["block_bytes"],
            send=lambda *piece: self._send_piece(number, *piece),
            remainder=lambda: handover.tracker.count,
        )
        handover.round.feed()
        return handover.round.done

    def commit(self, number: int, deadline_s: float, verify: bool) -> dict[str, Any]:
        """Drain, copy the remainder, compare if asked to, and switch all ranks to the new layout.

        Returns ``{"crash": reason}`` when some ranks may have switched and others not.

        Raises:
            RuntimeError: Something failed before any rank switched. The old layout is in force.
        """
        handover = self._of(number)
        held_s = time.monotonic()
        self._failpoints.hit("core.drain")
        self._drain()
        drained_s = time.monotonic()
        self._failpoints.hit("core.commit")
        blocks = handover.tracker.take(self._live())
        try:
            self._ask_all(
                "flexpiped_commit_copy",
                number,
                handover.participants,
                blocks,
                deadline_s,
                wait_s=_PATIENCE * deadline_s,
            )
            if verify and not self._failpoints.hit("core.verify"):
                self._compare(handover, sorted(self._live()), wait_s=_PATIENCE * deadline_s)
            self._failpoints.hit("core.commit.last")
        except TimeoutError as error:  # a late answer would be taken for that of a step
            return self._crashed(f"a rank did not answer within {_PATIENCE * deadline_s:g} s of the commit: {error}")
        try:
            self._ask_all(
                "flexpiped_switch", number, handover.participants, self._epoch + 1, wait_s=_PATIENCE * deadline_s
            )
        except (TimeoutError, RuntimeError) as error:
            return self._crashed(f"a rank failed while it switched: {error}")
        self._epoch += 1
        for rank in self._ranks:
            stage = rank["pp_rank"]
            rank["layers"] = [i for i, holder in enumerate(handover.new_layout) if holder == stage]
        self._handover = None
        self._steps.committed(drained_s)
        return {
            "epoch": self._epoch,
            "drain_s": drained_s - held_s,
            "switch_s": time.monotonic() - drained_s,
            "remainder_blocks": len(blocks),
        }

    def load_compiled(self, deadline_s: float) -> dict[str, Any]:
        """Have the ranks that fell back to eager load their compiled code, and all use it from the same step on.

        Returns ``{"crash": reason}`` when a rank did not answer.

        Raises:
            RuntimeError: A rank could not load, or a handover is under way. All stay as they are.
        """
        if self._handover is not None:
            raise RuntimeError("a handover is under way")
        self._drain()
        started_s = time.monotonic()
        try:
            try:
                answers = self._ask_all("flexpiped_load_compiled", wait_s=deadline_s)
            except RuntimeError:
                self._ask_all("flexpiped_use_compiled", False, wait_s=deadline_s)
                raise
            self._ask_all("flexpiped_use_compiled", True, wait_s=deadline_s)
        except TimeoutError as error:
            return {"crash": f"a rank did not load its compiled code within {deadline_s:g} s: {error}"}
        return {"stall_s": time.monotonic() - started_s, "load_s": max(answer["load_s"] for answer in answers)}

    def pause(self) -> dict[str, Any]:
        """Return the commit pause: from the last result of the old epoch to the first dispatch of the new one."""
        return {"pause_s": self._steps.pause_s}

    def abandon(self, number: int) -> dict[str, Any]:
        """Forget a handover that was not committed."""
        if self._handover is not None and self._handover.number == number:
            self._handover = None
        return {}

    def settle(self) -> dict[str, Any]:
        """Forget what a daemon that is gone had begun, and say what is in force. A commit ends before this runs."""
        self._handover = None
        return {
            "epoch": self._epoch,
            "layout": self._layout(),
            "last_number": self._last_number,
            "crash": self._crash,
        }

    def arm(self, name: str, action: str) -> dict[str, Any]:
        self._failpoints.arm(name, action)
        return {}

    def pump(self) -> None:
        """Take in acknowledgements and send what may follow. Runs between steps and whenever one arrives."""
        self.kv.pump()
        handover = self._handover
        while self._answers:
            number, source, ticket, reason = self._answers.popleft()
            if handover is None or handover.round is None or number != handover.number:
                continue  # of one that was rolled back
            handover.round.acknowledge(source, ticket, reason)
        if handover is not None and handover.round is not None:
            handover.round.feed()

    # --- inside ---

    def _send_piece(self, number: int, ticket: int, layers: list[int], blocks: list[int]) -> None:
        args = (number, ticket, layers, blocks)
        self._core.model_executor.rpc_broadcast_mq.enqueue(("flexpiped_copy_out", args, {}, _NO_REPLY))

    def _drain(self) -> None:
        """Wait for the steps in flight; their results are kept for the step that takes them in."""
        for future, *_ in self._core.batch_queue or ():
            future.result()

    def _crashed(self, reason: str) -> dict[str, Any]:
        """Answer that some ranks may have switched and others not; a daemon that is gone does not hear it."""
        self._crash = reason
        return {"crash": reason}

    def _ask_all(self, method: str, *args: Any, wait_s: float) -> list[dict[str, Any]]:
        """Call all ranks between two steps. They never raise, which would leave answers of others in the queues."""
        answers: list[dict[str, Any]] = self._core.model_executor.collective_rpc(method, timeout=wait_s, args=args)
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            raise RuntimeError(errors[0])
        return answers

    def _compare(self, handover: _Handover, blocks: list[int], *, wait_s: float) -> None:
        """Every live KV block must be the same on source and destination."""
        answers = self._ask_all("flexpiped_checksums", handover.number, handover.participants, blocks, wait_s=wait_s)
        seen: dict[tuple[int, str], list[int]] = {}
        for rank, answer in enumerate(answers):
            for layer, values in answer.items():
                there = seen.setdefault((rank % self._tp, layer), values)
                wrong = sum(a != b for a, b in zip(there, values, strict=True))
                if wrong:
                    raise RuntimeError(f"{wrong} of {len(values)} KV blocks of layer {layer} differ at commit")

    def _layout(self) -> list[int]:
        """Return the pipeline rank of each layer."""
        holders = {layer: rank["pp_rank"] for rank in self._ranks for layer in rank["layers"]}
        return [holders[layer] for layer in sorted(holders)]

    def _targets(self, handover: _Handover, stage: int) -> dict[int, int]:
        pairs = enumerate(zip(handover.layout, handover.new_layout, strict=True))
        return {layer: new for layer, (old, new) in pairs if old == stage != new}

    def _sizes(self) -> dict[str, int]:
        return {name: self._ranks[0][name] for name in ("block_bytes", "buffer_bytes")}

    def _live(self) -> set[int]:
        """Return the KV blocks that belong to a request or can be found by their hash."""
        blocks = self._core.scheduler.kv_cache_manager.block_pool.blocks
        return {b.block_id for b in blocks if (b.ref_cnt > 0 or b.block_hash is not None) and not b.is_null}

    def _of(self, number: int) -> _Handover:
        if self._handover is None or self._handover.number != number:
            raise RuntimeError(f"handover {number} has not begun in the engine core")
        return self._handover

    def _mark(self, output: Any) -> None:
        """Mark what a step that is about to go out will write."""
        if self._handover is None:
            return
        scheduler = self._core.scheduler
        for request_id, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[request_id]
            end = request.num_computed_tokens  # already moved on
            (block_ids,) = scheduler.kv_cache_manager.get_block_ids(request_id)
            self._handover.tracker.mark(
                block_ids, first_token=end - count, end_token=end, block_tokens=self._block_tokens
            )

    def _read_answers(self) -> None:
        """In a thread: note acknowledgements and wake the main thread, which may be waiting for requests."""
        while True:
            handover, source, ticket, reason = json.loads(self._socket.recv(_RECEIVE_BYTES))
            self._answers.append((handover, source, ticket, reason))
            self._core.input_queue.put_nowait((internals.EngineCoreRequestType.WAKEUP, None))
