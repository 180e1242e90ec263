"""What the scheduler of rank 0 has done, over all micro-batches: SGLang's own figures are of one.

Of a scheduler that is not understood nothing is counted: it serves all the same.
"""

from functools import wraps
from typing import Any

_COUNTED = (
    *("running", "waiting", "kv_blocks_used", "prompt_tokens_total", "generated_tokens_total", "preemptions_total"),
    "steps_total",
)


class Uncounted:
    """Says what there is, and nothing of what is done with it."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def counters(self) -> dict[str, int]:
        """Return the same as ``Counting``. From any thread."""
        page = int(self._scheduler.page_size)
        capacity = int(self._scheduler.max_total_num_tokens) // page
        return dict.fromkeys(_COUNTED, 0) | {"kv_blocks_capacity": capacity, "kv_block_tokens": page}


class Counting:
    """Counts from when it is made. Raises: AttributeError, TypeError, LookupError: the scheduler is another one."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._prompt_tokens = self._generated_tokens = self._preemptions = self._steps = 0
        self.counters()  # before anything is changed: what is not there is missed now, not in a step
        self._watch_queue()
        self._watch_results()

    def counters(self) -> dict[str, int]:
        """Return the totals, and what is running, waiting and used now. From any thread."""
        scheduler = self._scheduler
        waiting = len(scheduler.waiting_queue) + len(scheduler.grammar_manager.grammar_queue)
        page = int(scheduler.page_size)
        used = int(scheduler.pool_stats_observer.get_pool_stats().get_kv_token_stats()[0])
        return {
            "running": len(self._running()),
            "waiting": waiting,
            "kv_blocks_used": -(-used // page),
            "kv_blocks_capacity": int(scheduler.max_total_num_tokens) // page,
            "kv_block_tokens": page,
            "prompt_tokens_total": self._prompt_tokens,
            "generated_tokens_total": self._generated_tokens,
            "preemptions_total": self._preemptions,
            "steps_total": self._steps,
        }

    def _running(self) -> set[str]:
        """Return the requests of every micro-batch that have not ended."""
        scheduler = self._scheduler
        batches = [scheduler.running_batch, scheduler.last_batch]
        for name in ("running_mbs", "mbs", "last_mbs"):
            batches += list(getattr(scheduler, name, ()) or ())
        requests = [request for batch in batches if batch is not None for request in list(batch.reqs)]
        chunked = scheduler.chunked_req
        requests += [chunked] if chunked is not None else []
        return {request.rid for request in requests if not request.finished()}

    def _watch_queue(self) -> None:
        add = self._scheduler._add_request_to_queue

        @wraps(add)
        def add_request_to_queue(req: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("is_retracted", any(args[:1])):
                self._preemptions += 1
            else:
                self._prompt_tokens += len(req.origin_input_ids)
            return add(req, *args, **kwargs)

        self._scheduler._add_request_to_queue = add_request_to_queue

    def _watch_results(self) -> None:
        process = self._scheduler.process_batch_result

        @wraps(process)
        def process_batch_result(batch: Any, *args: Any, **kwargs: Any) -> Any:
            requests = list(batch.reqs)
            before = sum(len(request.output_ids) for request in requests)
            answer = process(batch, *args, **kwargs)
            self._generated_tokens += sum(len(request.output_ids) for request in requests) - before
            self._steps += 1
            return answer

        self._scheduler.process_batch_result = process_batch_result
