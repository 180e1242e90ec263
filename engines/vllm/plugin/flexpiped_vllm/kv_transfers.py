"""What the engine core does when requests go to another vLLM: has their KV cache written, or loaded.

Calls to the ranks go through the queue that carries the steps. What is written is thus what the steps before have
computed, and what is loaded is there for the step that comes next. Nobody waits: the ranks answer by datagram.
"""

import json
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from flexpiped_served.staging import bind_datagram

from flexpiped_vllm import internals, refusals
from flexpiped_vllm.kv_rank import ANSWERS

_NO_REPLY = -1000  # no rank has this number, so none answers through vLLM's queue
_PIECES_UNDER_WAY = 4
_RECEIVE_BYTES = 1 << 16


@dataclass(slots=True)
class _Export:
    """A running request, some of whose KV blocks have been written. It goes on, which changes none of them."""

    request: Any
    preemptions: int
    directory: str
    num_tokens: int
    blocks: list[int]
    done: "Future[dict[str, Any]]"
    next_block: int = 0
    unanswered: int = 0


@dataclass(slots=True)
class _Opening:
    """The KV cache of a request that is to come."""

    directory: str
    num_tokens: int
    done: "Future[dict[str, Any]]"
    unanswered: int


class KvTransfers:
    """Added to one engine core; all but the thread that reads answers runs in the core's main thread.

    Args:
        ranks: What each rank said of itself.
        slice_bytes: How much a rank copies between two steps.
    """

    def __init__(self, core: Any, *, ranks: Sequence[dict[str, Any]], directory: Path, slice_bytes: int) -> None:
        self._core = core
        self._num_ranks = len(ranks)
        self._block_tokens = int(core.vllm_config.cache_config.block_size)
        self._block_bytes = sum(rank["kv_block_bytes"] for rank in ranks)
        self._blocks_at_once = max(1, slice_bytes // max(1, *(rank["kv_block_bytes"] for rank in ranks)))
        self.refusal = internals.check_connector() or refusals.of_kv_copy(core.scheduler)
        self.by_nixl = refusals.pulls_by_nixl(core.vllm_config)
        self.form = "" if self.refusal else self._form_of(ranks)
        self._numbers = count(1)
        self._exports: dict[int, _Export] = {}
        self._openings: dict[int, _Opening] = {}
        self._connector: Any = None
        self._answers: deque[tuple[int, str]] = deque()
        self._socket = bind_datagram(directory / ANSWERS)
        threading.Thread(target=self._read_answers, name="flexpiped-kv-answers", daemon=True).start()

    # --- utility calls ---

    def export(self, name: str, directory: str, limit_bytes: int) -> "Future[dict[str, Any]]":
        """Write the KV cache of the running request ``name`` to ``directory``: what it has computed by now.

        Raises:
            RuntimeError: There is nothing to write, or not the room for it.
        """
        if self.refusal:
            raise RuntimeError(self.refusal)
        request = self._request_of(name)
        tokens = request.num_computed_tokens  # those of a step under way, too: it comes before us
        blocks = self._blocks_of(request)[: -(-tokens // self._block_tokens)]
        num_bytes = len(blocks) * self._block_bytes
        if num_bytes > limit_bytes:
            raise RuntimeError(f"its KV cache takes {num_bytes} bytes, and shared memory has {limit_bytes} left")
        export = _Export(request, request.num_preemptions, directory, tokens, blocks, Future())
        number = next(self._numbers)
        self._exports[number] = export
        self._feed(number, export)
        return export.done

    def accept(self, directory: str, num_tokens: int) -> "Future[dict[str, Any]]":
        """Make ready to load what lies in ``directory``, for a request that names it."""
        if self.refusal:
            raise RuntimeError(self.refusal)
        number, blocks = next(self._numbers), -(-num_tokens // self._block_tokens)
        self._openings[number] = opening = _Opening(directory, num_tokens, Future(), self._num_ranks)
        self._send("flexpiped_kv_open", number, directory, blocks)
        return opening.done

    def forget(self, directory: str) -> dict[str, Any]:
        """Nothing in ``directory`` will be written or loaded any more. Idempotent."""
        for under_way in (self._exports, self._openings):
            for number, one in list(under_way.items()):
                if one.directory == directory:
                    self._fail(under_way, number, "it was given up")
        if self._connector is not None:
            self._send("flexpiped_kv_close", directory)
            if not self._connector.withdraw(directory):
                self._core.scheduler.connector = self._connector = None
        return {}

    def tokens(self, name: str) -> dict[str, Any]:
        """Return the tokens of the running request ``name`` that have been computed, and the bytes of their KV cache.

        Raises:
            RuntimeError: There are none.
        """
        if self.refusal:
            raise RuntimeError(self.refusal)
        request = self._request_of(name)
        tokens = list(request.all_token_ids[: request.num_computed_tokens])
        blocks = -(-len(tokens) // self._block_tokens)
        return {"tokens": tokens, "num_bytes": blocks * self._block_bytes}

    def pump(self) -> None:
        """Take in answers and send what may follow."""
        while self._answers:
            number, reason = self._answers.popleft()
            if number in self._exports:
                self._exported(number, self._exports[number], reason)
            elif number in self._openings:
                self._opened(number, self._openings[number], reason)

    # --- inside ---

    def _feed(self, number: int, export: _Export) -> None:
        while export.next_block < len(export.blocks) and export.unanswered < _PIECES_UNDER_WAY * self._num_ranks:
            start, piece = export.next_block, export.blocks[export.next_block :][: self._blocks_at_once]
            export.next_block += len(piece)
            export.unanswered += self._num_ranks
            self._send("flexpiped_kv_out", number, export.directory, start, piece, len(export.blocks))

    def _exported(self, number: int, export: _Export, reason: str) -> None:
        export.unanswered -= 1
        reason = reason or self._change_of(export)
        if reason:
            self._fail(self._exports, number, reason)
            return
        self._feed(number, export)
        if export.unanswered == 0:
            del self._exports[number]
            export.done.set_result(
                {"num_tokens": export.num_tokens, "num_bytes": len(export.blocks) * self._block_bytes}
            )

    def _change_of(self, export: _Export) -> str:
        """Say what became of a request whose KV blocks may be another's by now; nothing when it has them still."""
        request = export.request
        if self._core.scheduler.requests.get(request.request_id) is not request:
            return "the request has ended meanwhile"
        if request.num_preemptions != export.preemptions:
            return "the request was preempted meanwhile"
        return ""

    def _opened(self, number: int, opening: _Opening, reason: str) -> None:
        opening.unanswered -= 1
        scheduler = self._core.scheduler
        if not reason and scheduler.connector is not self._connector:
            reason = "vLLM has got a KV connector of its own"
        if reason:
            self._fail(self._openings, number, reason)
        elif opening.unanswered == 0:
            del self._openings[number]
            self._make_connector().offer(opening.directory, opening.num_tokens)
            opening.done.set_result({})

    def _make_connector(self) -> Any:
        if self._connector is None:
            from flexpiped_vllm.kv_connector import make_connector  # a vLLM without connectors serves all the same

            self._connector = make_connector(self._core.vllm_config, self._core.scheduler.kv_cache_config)
            self._connector.load = lambda *args: self._send("flexpiped_kv_in", *args)
            self._core.scheduler.connector = self._connector
        return self._connector

    def _fail(self, under_way: "dict[int, _Export] | dict[int, _Opening]", number: int, reason: str) -> None:
        under_way.pop(number).done.set_exception(RuntimeError(reason))

    def _request_of(self, name: str) -> Any:
        """Return the running request that the API server knows as ``name``; vLLM adds something to it."""
        requests = self._core.scheduler.requests
        found = next((one for key, one in requests.items() if key == name or key.startswith(f"{name}-")), None)
        if found is None or found.num_computed_tokens == 0:
            raise RuntimeError("it has computed nothing yet" if found is not None else "it has ended")
        return found

    def _blocks_of(self, request: Any) -> list[int]:
        (ids,) = self._core.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        return list(ids)

    def _form_of(self, ranks: Sequence[dict[str, Any]]) -> str:
        form = next((rank["kv_form"] for rank in ranks if rank["kv_form"]), "")
        degree = self._core.vllm_config.parallel_config.tensor_parallel_size
        layers = sum(rank["kv_layers"] for rank in ranks) // degree
        words = f"{layers} layers, {degree} shares, {self._block_tokens} tokens a block, {form}" if form else ""
        return f"by NIXL: {words}" if words and self.by_nixl else words

    def _send(self, method: str, *args: Any) -> None:
        """Have each rank call ``method`` before the next step, without an answer through vLLM's queue."""
        executor = self._core.model_executor
        queue = getattr(executor, "rpc_broadcast_mq", None)
        if queue is None:  # one rank, in this process
            executor.collective_rpc(method, args=args)
        else:
            queue.enqueue((method, args, {}, _NO_REPLY))

    def _read_answers(self) -> None:
        """In a thread: note answers and wake the main thread, which may be waiting for requests."""
        while True:
            number, reason = json.loads(self._socket.recv(_RECEIVE_BYTES))
            self._answers.append((number, reason))
            self._core.input_queue.put_nowait((internals.EngineCoreRequestType.WAKEUP, None))
