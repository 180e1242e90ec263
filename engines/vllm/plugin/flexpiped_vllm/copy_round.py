"""One round of a handover's copies: pieces go out while their source has buffers, and come back acknowledged."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from flexpiped_served.moving import BUFFERS
from flexpiped_served.pieces import Piece

Send = Callable[[int, list[int], list[int]], None]  # ticket, layers, KV blocks


@dataclass(slots=True)
class _Source:
    """One pipeline rank that sends."""

    pieces: deque[Piece]
    next_ticket: int = 0
    outstanding: dict[int, int] = field(default_factory=dict)  # acknowledgements still to come, by ticket

    @property
    def has_buffer(self) -> bool:
        is_free = all(ticket % BUFFERS != self.next_ticket % BUFFERS for ticket in self.outstanding)
        return len(self.outstanding) < BUFFERS and is_free


class CopyRound:
    """Runs in the core's main thread.

    Args:
        pieces: What each pipeline rank that has something to send is to send.
        degree: The tensor-parallel ranks of a pipeline rank, each of which acknowledges.
        block_bytes: Of one layer in one KV block of one rank.
        send: Has the ranks make a copy.
        remainder: Returns how many blocks have been written meanwhile.
    """

    def __init__(
        self,
        pieces: dict[int, Iterable[Piece]],
        *,
        sent_blocks: int,
        degree: int,
        block_bytes: int,
        send: Send,
        remainder: Callable[[], int],
    ) -> None:
        self._sources = {stage: _Source(deque(cut)) for stage, cut in pieces.items()}
        self._degree = degree
        self._block_bytes = block_bytes
        self._send = send
        self._remainder = remainder
        self._sent_blocks = sent_blocks
        self._sent_bytes = 0
        self.done: Future[dict[str, Any]] = Future()

    def acknowledge(self, rank: int, ticket: int, reason: str) -> None:
        """A rank has got a piece, or could not take it."""
        if reason:
            if not self.done.done():
                self.done.set_exception(RuntimeError(reason))
            return
        outstanding = self._sources[rank // self._degree].outstanding
        outstanding[ticket] -= 1
        if outstanding[ticket] == 0:
            del outstanding[ticket]

    def feed(self) -> None:
        """Send pieces while their source has buffers; settle the round when everything has arrived."""
        for source in self._sources.values():
            while source.pieces and source.has_buffer:
                layers, blocks = source.pieces.popleft()
                source.outstanding[source.next_ticket] = self._degree
                self._send(source.next_ticket, layers, blocks)
                source.next_ticket += 1
                self._sent_bytes += len(layers) * len(blocks) * self._block_bytes * self._degree
        if not self.done.done() and not any(each.pieces or each.outstanding for each in self._sources.values()):
            self.done.set_result(
                {
                    "sent_blocks": self._sent_blocks,
                    "sent_bytes": self._sent_bytes,
                    "remainder_blocks": self._remainder(),
                }
            )
