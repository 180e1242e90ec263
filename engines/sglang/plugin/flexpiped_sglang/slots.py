"""The scheduler's loop, seen as slots: one per micro-batch, the same sequence on every rank.

Rank 0 sends each slot's requests to the next rank, which sends them on: what rank 0 adds to them reaches every rank at
the same slot, before that slot's batch is chosen. So the ranks need no other agreement. A command is a plain tuple.
"""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

_MARK = "flexpiped"
Command = tuple[Any, ...]


class Slots:
    """Added to one scheduler.

    Args:
        before_slot: Called on rank 0 before each slot's requests are taken; what it sends goes with them.
        on_command: Told each command, in the scheduler's main thread, when the next rank has it, too.
        on_slot: Called once in each slot, after its commands.
        no_batch: Returns SGLang's word for a slot in which nothing runs, given the batch of running requests.
        would_run: Whether a slot with this running and this last batch has something to run.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        before_slot: Callable[[], None],
        on_command: Callable[[Command], None],
        on_slot: Callable[[], None],
        no_batch: Callable[[Any], Any],
        would_run: Callable[[Any, Any], bool],
    ) -> None:
        self._scheduler = scheduler
        self._before_slot = before_slot
        self._on_command = on_command
        self._on_slot = on_slot
        self._no_batch = no_batch
        self._would_run = would_run
        self._outbox: list[Command] = []
        self._inbox: list[Command] = []
        self.number = 0  # of the slot that this scheduler is in: on every rank the same, as each passes through all
        self.held_by: set[str] = set()  # while there is any, no batch is begun
        # Batches whose requests join the running ones of their slot when it goes on.
        self._unjoined: dict[int, Any] = {}
        self.held_back_s: float | None = None  # since when there was something to begin, the last time it was held
        self._is_holding = False
        self._send_with_requests()
        self._take_from_requests()
        self._hold_batches()
        self._see_held_prefills()

    def send(self, *command: Any) -> None:
        """Have all ranks do something at the slot whose requests are taken next. For rank 0, in its main thread."""
        self._outbox.append((_MARK, *command))

    def would_begin(self) -> bool:
        """Return whether the slot whose requests are about to be taken has something to begin. For rank 0."""
        return self._would_run(self._scheduler.running_batch, self._scheduler.last_batch)

    def hold_back(self) -> None:
        """Note that something was not begun because batches are held."""
        if self.held_back_s is None:
            self.held_back_s = time.monotonic()

    def _send_with_requests(self) -> None:
        poll = self._scheduler._poll_timeout_aborts

        @wraps(poll)
        def poll_timeout_aborts() -> list[Any]:
            aborts = poll()
            self._before_slot()
            commands, self._outbox = self._outbox, []
            return [*aborts, *commands]

        self._scheduler._poll_timeout_aborts = poll_timeout_aborts

    def _take_from_requests(self) -> None:
        process = self._scheduler.process_input_requests

        @wraps(process)
        def process_input_requests(recv_reqs: list[Any]) -> None:
            commands = [each for each in recv_reqs if isinstance(each, tuple) and each[:1] == (_MARK,)]
            process([each for each in recv_reqs if not isinstance(each, tuple)] if commands else recv_reqs)
            self._inbox += [command[1:] for command in commands]

        self._scheduler.process_input_requests = process_input_requests

    def _hold_batches(self) -> None:
        choose, scheduler = self._scheduler.get_next_batch_to_run, self._scheduler

        @wraps(choose)
        def get_next_batch_to_run(running_batch: Any, last_batch: Any) -> Any:
            self._do_commands()
            # Under pipeline parallelism SGLang itself does not look at the flag of its own pause.
            was_holding, self._is_holding = self._is_holding, bool(self.held_by or scheduler._engine_paused)
            if not self._is_holding:
                self._unjoined.pop(id(last_batch), None)
                return choose(running_batch=running_batch, last_batch=last_batch)
            if last_batch is not None:
                self._unjoined[id(last_batch)] = last_batch
            if not was_holding:
                self.held_back_s = None
            if self._would_run(running_batch, last_batch):
                self.hold_back()
            return self._no_batch(running_batch)

        scheduler.get_next_batch_to_run = get_next_batch_to_run

    def _do_commands(self) -> None:
        """By now the requests of this slot have been sent on: no rank waits for what an earlier one does for a move."""
        self.number += 1
        commands, self._inbox = self._inbox, []
        for command in commands:
            self._on_command(command)
        self._on_slot()

    def _see_held_prefills(self) -> None:
        """Keep in sight what was prefilled and has not joined the running requests of its slot when batches are held.

        A slot without a batch forgets it: SGLang would not find it to abort, and without another request would think
        itself idle, its KV cache leaked, and end itself.
        """
        scheduler = self._scheduler
        drained, in_flight = scheduler._pp_microbatches_drained, scheduler._collect_inflight_batches

        @wraps(drained)
        def pp_microbatches_drained() -> bool:
            unjoined = (request for batch in self._unjoined.values() for request in batch.reqs)
            return bool(drained()) and all(request.finished() for request in unjoined)

        @wraps(in_flight)
        def collect_inflight_batches() -> list[Any]:
            return [*in_flight(), *self._unjoined.values()]

        scheduler._pp_microbatches_drained = pp_microbatches_drained
        scheduler._collect_inflight_batches = collect_inflight_batches
