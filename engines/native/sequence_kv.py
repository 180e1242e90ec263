"""Which KV blocks hold what of which sequence: what can be found again, what is live, and what has to be moved."""

from collections.abc import Sequence as Some

import numpy as np
import numpy.typing as npt

from engines.native.kv_blocks import KVBlocks
from engines.native.sequence import Sequence


class SequenceKv:
    """Writes the block table: one row for each running sequence.

    Args:
        caches_prefixes: Full KV blocks are kept for sequences to come.
    """

    def __init__(
        self, *, blocks: KVBlocks, table: npt.NDArray[np.int32], block_tokens: int, caches_prefixes: bool
    ) -> None:
        self._blocks = blocks
        self._table = table
        self._block_tokens = block_tokens
        self.caches_prefixes = caches_prefixes

    # --- of one sequence ---

    def append(self, sequence: Sequence, block_ids: list[int]) -> None:
        """It has these KV blocks, too, for what comes next of it."""
        start = len(sequence.block_ids)
        sequence.block_ids.extend(block_ids)
        self._table[sequence.row, start : start + len(block_ids)] = block_ids

    def slots_of(self, sequence: Sequence, start: int, end: int) -> npt.NDArray[np.int64]:
        """Return the token slots of positions ``start`` to ``end - 1``."""
        size = self._block_tokens
        positions = np.arange(start, end, dtype=np.int64)
        blocks: npt.NDArray[np.int64] = self._table[sequence.row, positions // size].astype(np.int64)
        return blocks * size + positions % size

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """Return the KV blocks that hold its first tokens already.

        At least one token is left to be computed: the next one follows from it. Of a prompt whose tokens are to be
        scored, only what was scored before counts: a score is made where a token is computed.
        """
        if not self.caches_prefixes:
            return []
        usable = len(sequence.tokens) - 1 if sequence.scores is None else len(sequence.scores)
        names = sequence.names_of_blocks(usable // self._block_tokens, block_tokens=self._block_tokens)
        return self._blocks.find(names)

    def name_filled(self, sequence: Sequence, start: int) -> None:
        """What it has filled from position ``start`` on can be found from now on."""
        if not self.caches_prefixes:
            return
        first, end = start // self._block_tokens, sequence.computed // self._block_tokens
        names = sequence.names_of_blocks(end, block_tokens=self._block_tokens)
        for index in range(first, end):
            self._blocks.name(sequence.block_ids[index], names[index])

    # --- of all that run ---

    def live(self, running: Some[Sequence]) -> dict[int, int]:
        """Return how many slots are valid of each KV block that somebody needs or may find."""
        size = self._block_tokens
        live = dict.fromkeys(self._blocks.cached, size)
        for sequence in running:
            full, rest = divmod(sequence.computed, size)
            live.update(dict.fromkeys(sequence.block_ids[:full], size))
            if rest:  # never shared
                live[sequence.block_ids[full]] = rest
        return live

    def live_slots(self, running: Some[Sequence]) -> npt.NDArray[np.int64]:
        """Return the token slots of those."""
        live = self.live(running)
        blocks = np.fromiter(live.keys(), dtype=np.int64, count=len(live))[:, None]
        valid = np.fromiter(live.values(), dtype=np.int64, count=len(live))[:, None]
        within = np.arange(self._block_tokens)
        slots: npt.NDArray[np.int64] = (blocks * self._block_tokens + within)[within < valid]
        return slots

    # --- fewer KV blocks ---

    def relocate(self, running: Some[Sequence], most: int) -> list[tuple[int, int]]:
        """Replace KV blocks beyond the capacity that are in no step in flight; return at most ``most`` (from, to)."""
        pairs: list[tuple[int, int]] = []
        for old, places in self._places_above(running).items():
            if len(pairs) == most:
                break
            if any(sequence.in_flight for sequence, _ in places):
                continue
            new = self._blocks.replace(old)
            if new is None:
                break
            for sequence, index in places:
                sequence.block_ids[index] = self._table[sequence.row, index] = new
            pairs.append((old, new))
        return pairs

    def waiting_for_a_move(self, running: Some[Sequence]) -> set[Sequence]:
        """Return those that share a KV block beyond the capacity with one in flight.

        In turns they would have it in use for ever, and it could not be moved.
        """
        if not self._blocks.num_above:
            return set()
        shared = (places for places in self._places_above(running).values() if any(s.in_flight for s, _ in places))
        return {sequence for places in shared for sequence, _ in places}

    def _places_above(self, running: Some[Sequence]) -> dict[int, list[tuple[Sequence, int]]]:
        """Return where each KV block beyond the capacity is in use, those of the oldest sequences first."""
        places: dict[int, list[tuple[Sequence, int]]] = {}
        for sequence in sorted(running, key=lambda s: s.order):
            for index, block in enumerate(sequence.block_ids):
                if block > self._blocks.capacity:
                    places.setdefault(block, []).append((sequence, index))
        return places
