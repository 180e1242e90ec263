"""The steps of vLLM's engine core as its scheduler sees them: counted, timed, and told of just before they go out."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

_TRACE_LENGTH = 200_000


class StepWatch:
    """Watches one scheduler, in the core's main thread.

    Args:
        epoch: Returns the one in force.
        before_dispatch: Told what the scheduler has put into a step, which is about to go out.
    """

    def __init__(self, scheduler: Any, *, epoch: Callable[[], int], before_dispatch: Callable[[Any], None]) -> None:
        self._epoch = epoch
        self._before_dispatch = before_dispatch
        self._ends: deque[tuple[float, int]] = deque(maxlen=_TRACE_LENGTH)
        self._dispatches: deque[float] = deque(maxlen=_TRACE_LENGTH)
        self._committed_s = self._first_dispatch_s = 0.0
        self._steps = self._prompt_tokens = self._generated_tokens = self._preemptions = 0
        self._wrap(scheduler)

    @property
    def totals(self) -> dict[str, int]:
        return {
            "prompt_tokens_total": self._prompt_tokens,
            "generated_tokens_total": self._generated_tokens,
            "preemptions_total": self._preemptions,
            "steps_total": self._steps,
        }

    def take_trace(self) -> dict[str, Any]:
        """Return when steps ended and began since the last call."""
        ends, dispatches = list(self._ends), list(self._dispatches)
        self._ends.clear()
        self._dispatches.clear()
        return {"ends_s": [t for t, _ in ends], "epochs": [e for _, e in ends], "dispatches_s": dispatches}

    def committed(self, drained_s: float) -> None:
        """A new epoch is in force; the last step of the old one ended at ``drained_s``."""
        self._committed_s, self._first_dispatch_s = drained_s, 0.0

    @property
    def pause_s(self) -> float | None:
        """From the last result of the old epoch to the first dispatch of the new one; None before that."""
        return self._first_dispatch_s - self._committed_s if self._first_dispatch_s else None

    def _wrap(self, scheduler: Any) -> None:
        schedule, update = scheduler.schedule, scheduler.update_from_output

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if output.total_num_scheduled_tokens:
                self._begins(output)
            return output

        def updated(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = update(scheduler_output, *args, **kwargs)
            if scheduler_output.total_num_scheduled_tokens:
                self._ended(outputs)
            return outputs

        scheduler.schedule, scheduler.update_from_output = scheduled, updated

    def _begins(self, output: Any) -> None:
        now_s = time.monotonic()
        self._dispatches.append(now_s)
        if self._first_dispatch_s == 0.0:
            self._first_dispatch_s = now_s
        self._preemptions += len(output.preempted_req_ids or ())
        self._prompt_tokens += sum(len(new.prompt_token_ids or ()) for new in output.scheduled_new_reqs)
        self._before_dispatch(output)

    def _ended(self, outputs: Any) -> None:
        self._ends.append((time.monotonic(), self._epoch()))
        self._steps += 1
        self._generated_tokens += sum(len(one.new_token_ids) for group in outputs.values() for one in group.outputs)
