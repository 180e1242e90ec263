"""What the scheduler of rank 0 has done, over all micro-batches: SGLang's own figures are of one."""

from functools import wraps
from typing import Any


class Counting:
    """Counts from when it is made."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._prompt_tokens = self._generated_tokens = self._preemptions = self._steps = 0
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
        def add_request_to_queue(req: Any, is_retracted: bool = False) -> Any:
            if is_retracted:
                self._preemptions += 1
            else:
                self._prompt_tokens += len(req.origin_input_ids)
            return add(req, is_retracted)

        self._scheduler._add_request_to_queue = add_request_to_queue

    def _watch_results(self) -> None:
        process = self._scheduler.process_batch_result

        @wraps(process)
        def process_batch_result(batch: Any, result: Any) -> Any:
            requests = list(batch.reqs)
            before = sum(len(request.output_ids) for request in requests)
            answer = process(batch, result)
            self._generated_tokens += sum(len(request.output_ids) for request in requests) - before
            self._steps += 1
            return answer

        self._scheduler.process_batch_result = process_batch_result
