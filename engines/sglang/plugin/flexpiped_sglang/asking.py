"""Commands that ranks answer: sent with the requests of a slot; their answers are awaited over the slots that follow.

While batches are held, rank 0 waits for answers inside a slot that would begin one: that slot can then be the first of
what comes next. Going on through empty slots instead would cost a whole turn of them, and take the processors from the
ranks that are waited for.
"""

import threading
from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from typing import Any

from flexpiped_sglang.answers import Answer
from flexpiped_sglang.slots import Slots

_LONGEST_WAIT_S = 0.05  # in one slot, so that calls are taken even when a rank hangs


@dataclass(slots=True)
class _Asked:
    slot: int
    answers: dict[int, Answer] = field(default_factory=dict)  # by rank


class Asking:
    """For the main thread of rank 0; answers come from another one.

    Args:
        stages: Pipeline ranks.
        group: Processes that answer in each of them.
    """

    def __init__(self, slots: Slots, *, stages: int, group: int) -> None:
        self._slots = slots
        self._group = group
        self._everyone = self.members(range(stages))
        # Results go round all ranks, each of which sends on what it got a slot before, and every second one first waits
        # for its own: the last rank ends a slot once rank 0 has sent those of so many slots later.
        self._lead_slots = 1 + (stages - 1) // 2
        self._slot = 0
        self._tickets = 0
        self._asked: dict[int, _Asked] = {}
        self._news = threading.Condition()

    @property
    def next_ticket(self) -> int:
        return self._tickets + 1

    def members(self, stages: Collection[int]) -> frozenset[int]:
        """Return the ranks of some stages."""
        return frozenset(stage * self._group + index for stage in stages for index in range(self._group))

    def begin_slot(self) -> None:
        """A slot begins, whose requests have not been taken yet."""
        self._slot += 1

    def note(self, ticket: int, rank: int, answer: Answer) -> None:
        """Take an answer in. From any thread."""
        with self._news:
            if ticket in self._asked:  # else of work that was given up
                self._asked[ticket].answers[rank] = answer
                self._news.notify()

    def put(self, command: str, *arguments: Any) -> int:
        """Send a command with the requests of this slot, and return its ticket, to be given back by ``forget``."""
        self._tickets += 1
        with self._news:
            self._asked[self._tickets] = _Asked(self._slot)
        self._slots.send(command, self._tickets, *arguments)
        return self._tickets

    def forget(self, ticket: int) -> None:
        """Take no more answers."""
        with self._news:
            del self._asked[ticket]

    def answers(self, ticket: int, ranks: Collection[int] | None = None) -> Generator[None, None, list[Answer]]:
        """Return all answers that are there as soon as those of ``ranks`` are (of all, unless some are named).

        Raises:
            RuntimeError: One of them is an error.
        """
        wanted, asked = self._everyone if ranks is None else ranks, self._asked[ticket]
        while not self._has(asked, wanted):
            yield
            if self._may_wait(asked):
                self._slots.hold_back()
                with self._news:
                    self._news.wait_for(lambda: self._has(asked, wanted), timeout=_LONGEST_WAIT_S)
        found = [answer for _, answer in sorted(asked.answers.items())]
        for answer in found:
            if "error" in answer:
                raise RuntimeError(answer["error"])
        return found

    def ask(self, command: str, *arguments: Any) -> Generator[None, None, list[Answer]]:
        """Have all ranks do something at the same slot, and return their answers. Raises: RuntimeError."""
        ticket = self.put(command, *arguments)
        try:
            return (yield from self.answers(ticket))
        finally:
            self.forget(ticket)

    def _has(self, asked: _Asked, wanted: Collection[int]) -> bool:
        return all(rank in asked.answers for rank in wanted)

    def _may_wait(self, asked: _Asked) -> bool:
        """Return whether this slot would begin a batch but for the hold, and no rank needs rank 0 to go on first."""
        is_due = self._slot >= asked.slot + self._lead_slots
        return is_due and bool(self._slots.held_by) and self._slots.would_begin()
