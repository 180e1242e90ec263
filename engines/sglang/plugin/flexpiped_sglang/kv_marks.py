"""Which KV blocks must still be sent: marks by block id. Knows nothing of SGLang.

Each rank marks what its own steps write: the schedulers of all ranks give out the same slots in the same order.
"""

import zlib

import torch


class KvMarks:
    """Marks what steps write while a handover is under way.

    Args:
        live: Which KV blocks are somebody's, by id: everything there counts as written at first.
        block_tokens: Token slots in a block.
    """

    def __init__(self, live: torch.Tensor, *, block_tokens: int) -> None:
        self._written = live.clone()
        self._block_tokens = block_tokens

    @property
    def count(self) -> int:
        return int(self._written.sum())

    def mark(self, slots: torch.Tensor) -> None:
        """A step writes these token slots."""
        self._written[slots // self._block_tokens] = True
        self._written[0] = False  # padding: nobody's

    def take(self, live: torch.Tensor) -> list[int]:
        """Return the marked KV blocks that are still live, in order, and forget all marks.

        A block that was freed is nobody's; when it is used again, that use writes and marks it.
        """
        taken: list[int] = (self._written & live).nonzero().flatten().tolist()
        self._written.zero_()
        return taken


def fingerprint(live: torch.Tensor) -> int:
    """Return a number that two ranks agree on only when they hold the same KV blocks live."""
    return zlib.crc32(live.to(torch.uint8).numpy().tobytes())
