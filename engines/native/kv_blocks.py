"""Which KV blocks are free. KV block ids are global over the stages; id 0 is never given out (a place for warm-ups).

There are as many as the address space has room for; those above ``capacity`` are not given out. One that is in use when
the capacity falls below it stays with its owners, counted by ``num_above``, until they give it back.

Several may own one whose contents are known by name (``engines.native.kv_prefixes``): nobody writes into it any more.
Without an owner it is kept for whoever comes with the same prefix, and counts as free.
"""

from collections.abc import Iterable, Sequence

from engines.native.kv_prefixes import KvPrefixes


class KVBlocks:
    """A free list. ``capacity`` counts the KV blocks that can be given out, ``most`` what it can be raised to."""

    def __init__(self, *, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"at least 2 KV blocks are needed, not {num_blocks}")
        self.most = num_blocks - 1
        self.capacity = self.most
        self._free = list(range(num_blocks - 1, 0, -1))  # and nothing of use in them
        self._owners: dict[int, int] = {}  # of each one in use, how many there are
        self._above: set[int] = set()
        self._prefixes = KvPrefixes()

    @property
    def free(self) -> int:
        """How many can be given out: what is free, less what the owners of those above the capacity will need of it."""
        return max(0, self.capacity - len(self._owners))

    @property
    def used(self) -> int:
        return len(self._owners)

    @property
    def cached(self) -> tuple[int, ...]:
        """Those without an owner that are kept for a prefix, the one that goes first at the front."""
        return self._prefixes.idle

    @property
    def num_cached(self) -> int:
        return self._prefixes.num_idle

    @property
    def num_above(self) -> int:
        """How many KV blocks above the capacity are still in use."""
        return len(self._above)

    def take(self, count: int) -> list[int] | None:
        """Return ``count`` KV block ids, or None (and nothing) when there are not enough."""
        if count > self.free:
            return None
        taken = [self._unused() for _ in range(count)]
        self._owners.update(dict.fromkeys(taken, 1))
        return taken

    def give_back(self, block_ids: Sequence[int]) -> None:
        """One owner needs them no more. Of those that are kept for their names, the last ones go first."""
        for block in reversed(block_ids):
            owners = self._owners.get(block)
            if owners is None:
                raise AssertionError("a KV block was given back twice")
            if owners > 1:
                self._owners[block] = owners - 1
                continue
            del self._owners[block]
            if block > self.capacity:
                self._above.remove(block)
                self._prefixes.forget(block)
            elif not self._prefixes.rest(block):
                self._free.append(block)

    # --- contents that several may use ---

    def name(self, block_id: int, name: bytes) -> None:
        """Say what one in use holds, which is full and will not be written again."""
        self._prefixes.name(block_id, name)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Return the KV blocks with these names, up to the first that is not there or is about to be moved."""
        found = self._prefixes.find(names)
        for index, block in enumerate(found):
            if block > self.capacity:
                return found[:index]
        return found

    def free_without(self, block_ids: Iterable[int]) -> int:
        """Return how many can be given out once these have an owner more."""
        return self.free - sum(block not in self._owners for block in block_ids)

    def share(self, block_ids: Iterable[int]) -> None:
        """Give KV blocks that were found an owner more. There must be enough: see ``free_without``."""
        for block in block_ids:
            self._prefixes.wake(block)
            self._owners[block] = self._owners.get(block, 0) + 1

    def forget_contents(self) -> None:
        """Nothing is found any more, until it is computed again."""
        self._free.extend(self._prefixes.clear())

    def drop_cached(self, *, keep: int = 0) -> None:
        """Of what has no owner, keep only what was used last."""
        self._free.extend(self._prefixes.evict() for _ in range(self.num_cached - keep))

    # --- another number ---

    def replace(self, block_id: int) -> int | None:
        """Take back one above the capacity, and return one below it for its owners; None: none is free now.

        What it holds is known by the new one's number from now on.
        """
        if not self._free and not self._prefixes.num_idle:
            return None
        new = self._unused()
        self._above.remove(block_id)
        self._owners[new] = self._owners.pop(block_id)
        self._prefixes.moved(block_id, new)
        return new

    def resize(self, capacity: int) -> None:
        """Give out KV blocks up to number ``capacity`` from now on; cached ones above it are lost.

        Raises:
            ValueError: There cannot be as many, or as few.
        """
        if not 1 <= capacity <= self.most:
            raise ValueError(f"there can be 1 to {self.most} KV blocks, not {capacity}")
        if capacity < self.capacity:
            self._above.update(block for block in range(capacity + 1, self.capacity + 1) if block in self._owners)
            self._free = [block for block in self._free if block <= capacity]
            for block in self.cached:
                if block > capacity:
                    self._prefixes.forget(block)
        else:  # what comes back is given out last: it is not backed by memory yet
            self._free[:0] = (block for block in range(capacity, self.capacity, -1) if block not in self._above)
            self._above = {block for block in self._above if block > capacity}
        self.capacity = capacity

    def _unused(self) -> int:
        return self._free.pop() if self._free else self._prefixes.evict()
