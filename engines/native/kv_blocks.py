"""Which KV blocks are free. KV block ids are global over the stages; id 0 is never given out (a place for warm-ups)."""


class KVBlocks:
    """A free list. ``capacity`` counts the KV blocks that can be given out."""

    def __init__(self, *, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"at least 2 KV blocks are needed, not {num_blocks}")
        self.capacity = num_blocks - 1
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.capacity - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Return ``count`` KV block ids, or None (and nothing) when there are not enough."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, block_ids: list[int]) -> None:
        self._free.extend(reversed(block_ids))
        if len(self._free) > self.capacity:
            raise AssertionError("a KV block was given back twice")
