"""What rank 0 does for a handover: commands that reach all ranks at the same slot, and their answers.

A piece of work is a generator in the scheduler's main thread that goes on once in each slot. One runs at a time.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from flexpiped_served.failpoints import Failpoints
from flexpiped_served.side import Reply

from flexpiped_sglang.answers import Answer
from flexpiped_sglang.asking import Asking
from flexpiped_sglang.slots import Slots

_MOVE, _PAUSE = "move", "pause"  # who holds the batches
_PATIENCE = 2.0  # times the deadline that ranks keep themselves
_TRACE_LENGTH = 200_000
_CALLS = ("begin", "round", "commit", "abandon", "pause", "trace", "arm", "hold", "resume", "settle")
_AT_ONCE = ("abandon", "pause", "trace", "arm")  # whatever else is under way

Work = Generator[None, None, dict[str, Any]]


class Conductor:
    """Added to the scheduler of rank 0.

    Args:
        layout: The pipeline rank of each layer, at start.
        stages: Pipeline ranks.
        group: How many processes answer a command in each of them.
        drain_slots: After so many without a new batch the results of all are in, on every rank.
    """

    def __init__(
        self, slots: Slots, *, layout: list[int], stages: int, group: int, drain_slots: int, failpoints: Failpoints
    ) -> None:
        self._slots = slots
        self.layout = layout
        self._stages, self._group = stages, group
        self._asking = Asking(slots, stages=stages, group=group)
        self._drain_slots = drain_slots
        self._failpoints = failpoints
        self._epoch = 0
        self._number = 0  # of the handover under way
        self._last_number = 0  # of all handovers
        self._crash = ""  # what a commit has answered that leaves the ranks in doubt
        self._new_layout: list[int] = []
        self._calls: deque[tuple[str, list[Any], Reply, int]] = deque()  # filled by a thread
        self._work: tuple[Work, Reply, int] | None = None
        self._switching: tuple[int, Callable[[str], None]] | None = None  # the ticket, and what tells of a crash
        self._pause_s: float | None = None  # of the last commit, once a batch has been begun after it
        self._ends: deque[tuple[float, int]] = deque(maxlen=_TRACE_LENGTH)
        self._dispatches: deque[float] = deque(maxlen=_TRACE_LENGTH)
        self._has_begun = False  # a batch, in the slot before this one

    # --- from other threads ---

    def take(self, method: str, arguments: list[Any], reply: Reply, call: int) -> None:
        """Queue a call for the main thread."""
        self._calls.append((method.removeprefix("flexpiped_"), arguments, reply, call))

    def on_answer(self, ticket: int, rank: int, answer: Answer) -> None:
        switching = self._switching
        if switching is not None and switching[0] == ticket and "error" in answer:
            # Told from here: by now the main thread may wait for what that rank no longer computes.
            switching[1](_failed_switch(answer["error"]))
        self._asking.note(ticket, rank, answer)

    # --- steps, in the main thread ---

    def dispatched(self) -> None:
        """A batch is about to run."""
        now_s = time.monotonic()
        self._has_begun = True
        self._dispatches.append(now_s)
        if self._pause_s is None:
            held_back_s = self._slots.held_back_s
            self._pause_s = 0.0 if held_back_s is None else now_s - held_back_s

    def ended(self) -> None:
        """The results of a batch are in."""
        self._ends.append((time.monotonic(), self._epoch))

    def on_slot(self) -> None:
        """A slot begins: begin what was asked for, and go on with what is under way."""
        self._asking.begin_slot()
        while self._calls and (self._work is None or self._calls[0][0] in _AT_ONCE):
            self._start(*self._calls.popleft())
        if self._work is not None:
            self._go_on(*self._work)
        self._has_begun = False

    # --- calls ---

    def _start(self, name: str, arguments: list[Any], reply: Reply, call: int) -> None:
        if name not in _CALLS:
            reply({"op": "reply", "call": call, "error": f"no {name} here"})
            return
        try:
            answer = getattr(self, f"_{name}")(*arguments)
        except RuntimeError as error:
            reply({"op": "reply", "call": call, "error": f"{type(error).__name__}: {error}"})
            return
        if isinstance(answer, dict):
            reply({"op": "reply", "call": call, "result": answer})
        else:
            self._work = (answer, reply, call)

    def _go_on(self, work: Work, reply: Reply, call: int) -> None:
        try:
            next(work)
        except StopIteration as done:
            self._work = None
            reply({"op": "reply", "call": call, "result": done.value})
        except RuntimeError as error:
            self._work = None
            reply({"op": "reply", "call": call, "error": f"{type(error).__name__}: {error}"})

    def _arm(self, name: str, action: str) -> dict[str, Any]:
        self._failpoints.arm(name, action)
        return {}

    def _trace(self) -> dict[str, Any]:
        ends, dispatches = list(self._ends), list(self._dispatches)
        self._ends.clear()
        self._dispatches.clear()
        return {"ends_s": [t for t, _ in ends], "epochs": [e for _, e in ends], "dispatches_s": dispatches}

    def _pause(self) -> dict[str, Any]:
        """Return the commit pause: from the first batch that was held back to the first dispatch of the new epoch."""
        return {"pause_s": self._pause_s}

    def _abandon(self, number: int) -> dict[str, Any]:
        """Forget a handover that was not committed, whatever of it is under way."""
        if self._work is not None:
            (_, reply, call), self._work = self._work, None
            reply({"op": "reply", "call": call, "error": "rolled back"})
        self._slots.send("release", _MOVE)
        self._slots.send("abandon", number)
        self._number = 0
        return {}

    def _settle(self) -> dict[str, Any]:
        """End what a daemon that is gone had begun, and say what is in force. A commit has ended before this begins."""
        if self._number:
            self._abandon(self._number)
        self._slots.send("release", _PAUSE)
        return {
            "epoch": self._epoch,
            "layout": self.layout,
            "last_number": self._last_number,
            "crash": self._crash,
        }

    def _hold(self) -> Work:
        """Pause: no batch is begun, and nothing is in flight when this is answered. Requests stay."""
        self._slots.send("hold", _PAUSE)
        for _ in range(self._drain_slots):
            yield
        return {}

    def _resume(self) -> dict[str, Any]:
        self._slots.send("release", _PAUSE)
        return {}

    def _begin(self, number: int, new_layout: list[int]) -> dict[str, Any]:
        """Have all ranks begin to mark what steps write; everything live counts as written."""
        self._failpoints.hit("core.begin")
        if len(new_layout) != len(self.layout):
            raise RuntimeError(f"the model has {len(self.layout)} layers, not {len(new_layout)}")
        self._number = self._last_number = number
        self._new_layout = list(new_layout)
        self._slots.send("begin", number, self.layout, self._new_layout)
        return {}

    def _round(self, number: int) -> Work:
        """Copy what was written since the last round; done when all destinations have it."""
        self._of(number)
        self._failpoints.hit("core.round")
        answers = yield from self._asking.ask("round", number)
        return {
            "sent_blocks": max(answer["sent_blocks"] for answer in answers),
            "sent_bytes": sum(answer["sent_bytes"] for answer in answers),
            "remainder_blocks": max(answer["remainder_blocks"] for answer in answers),
        }

    def _commit(self, number: int, deadline_s: float, verify: bool) -> Work:
        """Hold batches, copy the remainder, compare if asked to, and switch all ranks to the new layout.

        Each rank copies in the slot from which on it begins no batch: it has run all that were begun before, and their
        results are still on their way. So the pipeline is not drained: the batches of a few slots are left out. Only
        ranks that lose layers have something to copy, so only they are waited for: those after them still run what was
        begun before while rank 0 begins the first batch of the new layout.

        Returns ``{"crash": reason}`` when some ranks may have switched and others not.

        Raises:
            RuntimeError: Something failed before any rank switched. The old layout is in force.
        """
        self._of(number)
        self._failpoints.hit("core.drain")
        return self._committing(number, deadline_s, verify)

    def _committing(self, number: int, deadline_s: float, verify: bool) -> Work:
        tell_crash, patience_s = self._crash_teller(), _PATIENCE * deadline_s
        # From a thread: when a rank hangs, this one's loop hangs, too, waiting for it.
        watch = threading.Timer(patience_s, tell_crash, [f"the ranks did not commit within {patience_s:g} s"])
        watch.daemon = True
        watch.start()
        ticket = 0
        try:
            yield from self._until_few_are_held()
            began_s = time.monotonic()
            self._slots.send("hold", _MOVE)
            self._failpoints.hit("core.commit")
            ticket = self._asking.put("commit_copy", number, deadline_s)
            copied = yield from self._copied(ticket, verify)
            drain_s = time.monotonic() - began_s  # until the last rank had come to that slot and had copied
            return (yield from self._switch(ticket, tell_crash)) | copied | {"drain_s": drain_s}
        except RuntimeError:
            self._slots.send("release", _MOVE)
            raise
        finally:
            watch.cancel()
            if ticket:
                self._asking.forget(ticket)

    def _until_few_are_held(self) -> Generator[None, None, None]:
        """Wait for a slot without a batch after one with a batch: all that follow till the next batch cost nothing.

        Where every slot has one, none is better than the others.
        """
        for _ in range(self._stages):
            if self._has_begun and not self._slots.would_begin():
                return
            yield

    def _copied(self, ticket: int, verify: bool) -> Work:
        losing = {old for old, new in zip(self.layout, self._new_layout, strict=True) if old != new}
        answers = yield from self._asking.answers(ticket, self._asking.members(losing))
        _agree(answers)
        if verify and not self._failpoints.hit("core.verify"):
            _compare((yield from self._asking.ask("checksums", self._number)), group=self._group)
        self._failpoints.hit("core.commit.last")
        return {"remainder_blocks": max(answer["blocks"] for answer in answers)}

    def _switch(self, copy_ticket: int, tell_crash: Callable[[str], None]) -> Work:
        number = self._number
        # What is dispatched from now on is of the new layout: ranks run batches again in the slot in which they switch.
        self._epoch += 1
        self.layout, self._number = self._new_layout, 0
        self._pause_s = None
        self._switching = (self._asking.next_ticket, tell_crash)
        try:
            _switched_together((yield from self._asking.ask("switch", number, self._epoch, _MOVE)))
            _agree((yield from self._asking.answers(copy_ticket)))  # of those that nobody waited for, too
        except RuntimeError as error:
            self._crash = _failed_switch(error)
            return {"crash": self._crash}
        finally:
            self._switching = None
        return {"epoch": self._epoch}

    # --- inside ---

    def _crash_teller(self) -> Callable[[str], None]:
        """Return what answers the call under way with a crash, from any thread."""
        assert self._work is not None
        _, reply, call = self._work

        def tell(reason: str) -> None:
            self._crash = reason  # a daemon that is gone does not hear it
            reply({"op": "reply", "call": call, "result": {"crash": reason}})

        return tell

    def _of(self, number: int) -> None:
        if self._number != number:
            raise RuntimeError(f"handover {number} has not begun")


def _failed_switch(error: object) -> str:
    return f"a rank failed while it switched: {error}"


def _agree(answers: list[Answer]) -> None:
    """All ranks must have the same KV blocks live. Raises: RuntimeError."""
    if len({answer["live"] for answer in answers}) != 1:
        raise RuntimeError("the ranks do not agree about which KV blocks are live")


def _switched_together(answers: list[Answer]) -> None:
    """Each batch runs under one layout on all ranks. Raises: RuntimeError."""
    slots = [answer["slot"] for answer in answers]
    if len(set(slots)) != 1:
        raise RuntimeError(f"slot {', '.join(map(str, slots))}, by rank, where it must be the same")


def _compare(answers: list[Answer], *, group: int) -> None:
    """Every live KV block of each share of a layer must be the same on source and destination. Raises: RuntimeError."""
    seen: dict[tuple[int, str], list[int]] = {}
    for rank, answer in enumerate(answers):
        for layer, values in answer.items():
            there = seen.setdefault((rank % group, layer), values)
            wrong = sum(a != b for a, b in zip(there, values, strict=True))
            if wrong:
                raise RuntimeError(f"{wrong} of {len(values)} KV blocks of layer {layer} differ at commit")
