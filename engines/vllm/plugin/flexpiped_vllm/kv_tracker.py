"""Which KV blocks must still be sent. Pure: block ids in, block ids out; knows nothing of vLLM."""

from collections.abc import Iterable


class KVTracker:
    """Marks what steps write while a handover is under way.

    A step is marked when it is scheduled, before it runs. A round takes the marks and is queued behind the steps that
    made them, so that it reads what they wrote; what is written later is marked for the next round.
    """

    def __init__(self, live: Iterable[int]) -> None:
        self._written = set(live)  # everything there is counts as written at first

    @property
    def count(self) -> int:
        return len(self._written)

    def mark(self, block_ids: list[int], *, first_token: int, end_token: int, block_tokens: int) -> None:
        """A request whose KV blocks are ``block_ids`` computes tokens ``first_token <= t < end_token``."""
        if end_token > first_token:
            self._written.update(block_ids[first_token // block_tokens : (end_token - 1) // block_tokens + 1])

    def take(self, live: set[int]) -> list[int]:
        """Return the marked KV blocks that are still live, in order, and forget all marks.

        A block that was freed is nobody's; when it is used again, that use writes and marks it.
        """
        taken = sorted(self._written & live)
        self._written.clear()
        return taken
