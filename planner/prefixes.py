"""Which first tokens of a request a replica has had before: a guess at what is in its prefix cache, kept outside of it.

Tokens count in runs of a fixed length. A run is known by its tokens and all before it, as the prefix caches of engines
know their KV blocks; the run that was not seen for longest is forgotten first.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

RUN_TOKENS = 32


class SeenPrefixes:
    """What one replica has seen, of at most ``capacity_tokens``."""

    def __init__(self, *, capacity_tokens: int, run_tokens: int = RUN_TOKENS) -> None:
        self._run_tokens = run_tokens
        self._most_runs = max(0, capacity_tokens // run_tokens)
        self._runs: OrderedDict[int, None] = OrderedDict()

    def add(self, token_ids: Sequence[int]) -> None:
        """The replica computes these tokens."""
        # From the end, so that the first runs are the ones seen last: without them the others are worth nothing.
        for run in reversed(list(self._hashes(token_ids))):
            self._runs[run] = None
            self._runs.move_to_end(run)
        while len(self._runs) > self._most_runs:
            self._runs.popitem(last=False)

    def match(self, token_ids: Sequence[int]) -> int:
        """Return how many of the first tokens it has seen, in whole runs."""
        matched = 0
        for run in self._hashes(token_ids):
            if run not in self._runs:
                break
            matched += self._run_tokens
        return matched

    def _hashes(self, token_ids: Sequence[int]) -> Iterator[int]:
        chain = 0
        for start in range(0, len(token_ids) - self._run_tokens + 1, self._run_tokens):
            chain = hash((chain, *token_ids[start : start + self._run_tokens]))
            yield chain
