"""Which KV blocks are free. KV block ids are global over the stages; id 0 is never given out (a place for warm-ups).

There are as many as the address space has room for; those above ``capacity`` are not given out. One that is in use when
the capacity falls below it stays with its owner, counted by ``num_above``, until that gives it back.
"""


class KVBlocks:
    """A free list. ``capacity`` counts the KV blocks that can be given out, ``most`` what it can be raised to."""

    def __init__(self, *, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"at least 2 KV blocks are needed, not {num_blocks}")
        self.most = num_blocks - 1
        self.capacity = self.most
        self._free = list(range(num_blocks - 1, 0, -1))
        self._above: set[int] = set()
        self._used = 0

    @property
    def free(self) -> int:
        """How many can be given out: what is free, less what the owners of those above the capacity will need of it."""
        return max(0, self.capacity - self._used)

    @property
    def used(self) -> int:
        return self._used

    @property
    def num_above(self) -> int:
        """How many KV blocks above the capacity are still in use."""
        return len(self._above)

    def take(self, count: int) -> list[int] | None:
        """Return ``count`` KV block ids, or None (and nothing) when there are not enough."""
        if count > self.free:
            return None
        self._used += count
        return [self._free.pop() for _ in range(count)]

    def give_back(self, block_ids: list[int]) -> None:
        self._used -= len(block_ids)
        below = [block for block in block_ids if block <= self.capacity]
        above = self._above.intersection(block_ids)
        if self._used < 0 or len(below) + len(above) != len(block_ids):
            raise AssertionError("a KV block was given back twice")
        self._free.extend(reversed(below))
        self._above -= above

    def replace(self, block_id: int) -> int | None:
        """Take back one above the capacity, and return one below it for the owner; None: none is free now."""
        if not self._free:
            return None
        self._above.remove(block_id)
        return self._free.pop()

    def resize(self, capacity: int) -> None:
        """Give out KV blocks up to number ``capacity`` from now on.

        Raises:
            ValueError: There cannot be as many, or as few.
        """
        if not 1 <= capacity <= self.most:
            raise ValueError(f"there can be 1 to {self.most} KV blocks, not {capacity}")
        if capacity < self.capacity:
            free = set(self._free)
            self._above.update(block for block in range(capacity + 1, self.capacity + 1) if block not in free)
            self._free = [block for block in self._free if block <= capacity]
        else:  # what comes back is given out last: it is not backed by memory yet
            self._free[:0] = (block for block in range(capacity, self.capacity, -1) if block not in self._above)
            self._above = {block for block in self._above if block > capacity}
        self.capacity = capacity
