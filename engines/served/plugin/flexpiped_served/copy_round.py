"""One round of a handover's copies: pieces go out while their source has buffers, and come back acknowledged.

vLLM's engine core runs one for all ranks, and each rank of SGLang one of its own.
"""

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
    """A pipeline rank that sends, or one rank of it."""

    pieces: deque[Piece]
    next_ticket: int = 0
    outstanding: dict[int, int] = field(default_factory=dict)  # acknowledgements still to come, by ticket

    @property
    def has_buffer(self) -> bool:
        return self.next_ticket - BUFFERS not in self.outstanding  # which had the buffer that is next


class CopyRound:
    """Used in one thread.

    Args:
        pieces: What each source that has something to send is to send.
        degree: The ranks of a source, each of which acknowledges: those of a tensor-parallel group, or one.
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
        self._sources = {number: _Source(deque(cut)) for number, cut in pieces.items()}
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

    def feed(self, *, at_most: int = BUFFERS) -> None:
        """Send pieces while their source has buffers, ``at_most`` of each; settle the round when all have arrived."""
        if self.done.done():
            return
        for source in self._sources.values():
            for _ in range(at_most):
                if not source.pieces or not source.has_buffer:
                    break
                layers, blocks = source.pieces.popleft()
                source.outstanding[source.next_ticket] = self._degree
                self._send(source.next_ticket, layers, blocks)
                source.next_ticket += 1
                self._sent_bytes += len(layers) * len(blocks) * self._block_bytes * self._degree
        if not any(each.pieces or each.outstanding for each in self._sources.values()):
            self.done.set_result(
                {
                    "sent_blocks": self._sent_blocks,
                    "sent_bytes": self._sent_bytes,
                    "remainder_blocks": self._remainder(),
                }
            )
