"""A rank's part in a handover, in its main thread: rounds of KV copy, the copy at the commit, the switch."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flexpiped_served.copy_round import CopyRound
from flexpiped_served.moving import Moving
from flexpiped_served.pieces import pieces_of
from flexpiped_served.staging import bind_datagram

from flexpiped_sglang import internals
from flexpiped_sglang.answers import Answer
from flexpiped_sglang.kv_marks import KvMarks, fingerprint

_RECEIVE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class _Round:
    copies: CopyRound
    answer: Callable[[Answer], None]


@dataclass(slots=True)
class _Handover:
    number: int
    takes_part: bool
    loses: bool  # a layer: has something to send
    marks: KvMarks
    round: _Round | None = None


class Sending:
    """Marks what steps write and sends it.

    Args:
        stage: The pipeline rank.
    """

    def __init__(self, moving: Moving, allocator: Any, *, directory: Path, rank: int, stage: int) -> None:
        self._moving = moving
        self._allocator = allocator
        self._rank, self._stage = rank, stage
        self._acks = bind_datagram(directory / f"round-{rank}.dgram")
        self._acks.setblocking(False)
        self._ack_path = str(directory / f"round-{rank}.dgram")
        self._handover: _Handover | None = None

    def mark(self, slots: torch.Tensor | None) -> None:
        """A step is about to write these token slots."""
        if self._handover is not None and slots is not None:
            self._handover.marks.mark(slots)

    def begin(self, number: int, layout: list[int], new_layout: list[int]) -> None:
        """Begin to mark what steps write; everything live counts as written."""
        changes = [(old, new) for old, new in zip(layout, new_layout, strict=True) if old != new]
        self._handover = _Handover(
            number=number,
            takes_part=any(self._stage in change for change in changes),
            loses=any(old == self._stage for old, _ in changes),
            marks=KvMarks(self._live(), block_tokens=self._allocator.page_size),
        )

    def begin_round(self, number: int, answer: Callable[[Answer], None]) -> None:
        """Begin to send what was written since the last round; ``answer`` is told when all has arrived."""
        handover = self._of(number)
        blocks = handover.marks.take(self._live())
        targets = self._moving.targets(number) if handover.takes_part else {}
        sizes = {"block_bytes": self._moving.block_bytes, "buffer_bytes": self._moving.buffer_bytes}
        copies = CopyRound(
            {self._rank: pieces_of(targets, blocks, **sizes)},
            sent_blocks=len(blocks),
            degree=1,
            block_bytes=self._moving.block_bytes,
            send=partial(self._moving.copy_out, number, reply_to=self._ack_path),
            remainder=lambda: handover.marks.count,
        )
        handover.round = _Round(copies, answer)
        self.pump()

    def pump(self) -> None:
        """Take in acknowledgements and send one piece: in each slot, so that no step waits for more."""
        handover = self._handover
        answers = self._arrived()
        if handover is None or handover.round is None:
            return
        running = handover.round
        for number, rank, ticket, reason in answers:
            if number == handover.number:  # else of one that was rolled back
                running.copies.acknowledge(rank, ticket, reason)
        running.copies.feed(at_most=1)
        done = running.copies.done
        if done.done():
            handover.round = None
            error = done.exception()
            running.answer(done.result() if error is None else {"error": str(error)})

    def commit_copy(self, number: int, deadline_s: float) -> Answer:
        """Send the remainder and return when it has been copied. The layers have not changed yet.

        A rank that loses no layer has nothing to send, and must not fail here: nobody waits for it.
        """
        handover = self._of(number)
        live = self._live()
        blocks = handover.marks.take(live)
        sent = self._moving.commit_copy(number, blocks, deadline_s) if handover.loses else {"bytes": 0}
        return {"blocks": len(blocks), "live": fingerprint(live), **sent}

    def checksums(self, number: int) -> Answer:
        """Return checksums of all live KV blocks for each layer that is to move, before the switch."""
        if not self._of(number).takes_part:
            return {}
        return self._moving.checksums(number, self._live().nonzero().flatten().tolist())

    def switch(self, number: int) -> Answer:
        """Put gained layers into the forward pass and take lost ones out: pointers only, nothing is copied."""
        if self._of(number).takes_part:
            self._moving.switch(number)
        self._handover = None
        return {}

    def abandon(self, number: int) -> None:
        """Forget a handover that was not committed."""
        if self._handover is not None and self._handover.number == number:
            self._handover = None

    # --- inside ---

    def _arrived(self) -> list[list[Any]]:
        """Return what destinations have said: the number of the handover, this rank's, ticket, and why not."""
        found = []
        with suppress(BlockingIOError):
            while True:
                found.append(json.loads(self._acks.recv(_RECEIVE_BYTES)))
        return found

    def _live(self) -> torch.Tensor:
        return internals.live_pages(self._allocator)

    def _of(self, number: int) -> _Handover:
        if self._handover is None or self._handover.number != number:
            raise RuntimeError(f"handover {number} has not begun on this rank")
        return self._handover
