"""What routing knows of one replica: its KV capacity, how fast it is, and which prefixes it has seen.

Learnt beside the requests and never waited for: until then it counts as unknown. A change of layout is learnt anew.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from engines.errors import EngineError
from engines.offers import KvRange
from engines.protocol import Engine, GenerationRequest
from planner.errors import PlannerError
from planner.layout import Pipeline
from planner.prefixes import SeenPrefixes
from planner.routing import Pace

PaceOf = Callable[[Pipeline], Pace | None]


def unknown_pace(_pipeline: Pipeline) -> Pace | None:
    """For whom nothing predicts it."""
    return None


class ReplicaFacts:
    """Used on one event loop.

    Args:
        pace_of: Predicts how fast a pipeline is; may block, and is called in a thread.
    """

    def __init__(self, pace_of: PaceOf = unknown_pace) -> None:
        self._pace_of = pace_of
        self.kv_capacity_tokens: int | None = None
        self.pace: Pace | None = None
        self._of: tuple[Engine, int, KvRange | None] | None = None  # engine, epoch, and what its KV cache can be
        self._prefixes: SeenPrefixes | None = None  # None: not learnt, or the engine keeps no prefixes
        self._learning: asyncio.Task[None] | None = None

    def refresh(self, engine: Engine) -> None:
        """Learn what there is to know, unless that has been done for the layout in force."""
        known = (engine, engine.epoch, engine.capabilities.kv_range)
        if self._of == known:
            return
        if self._of is None or self._of[0] is not engine:
            self._prefixes = None  # another instance has an empty cache
        self._of = known
        if self._learning is not None:
            self._learning.cancel()
        self._learning = asyncio.create_task(self._learn(engine), name="replica-facts")

    def boards(self, request: GenerationRequest) -> None:
        """A request goes to the replica."""
        if self._prefixes is not None:
            self._prefixes.add((*request.prompt_token_ids, *request.generated_token_ids))

    def cached_tokens(self, token_ids: Sequence[int]) -> int:
        """Return how many of the first tokens are probably in its KV cache."""
        return 0 if self._prefixes is None else self._prefixes.match(token_ids)

    async def close(self) -> None:
        """Learn nothing more."""
        if self._learning is not None:
            self._learning.cancel()
            await asyncio.wait([self._learning])

    async def _learn(self, engine: Engine) -> None:
        self.kv_capacity_tokens = self.pace = None
        with suppress(EngineError):
            counters = await engine.counters()
            self.kv_capacity_tokens = counters.kv_blocks_capacity * counters.kv_block_tokens
            if engine.capabilities.caches_prefixes and self._prefixes is None:
                self._prefixes = SeenPrefixes(capacity_tokens=self.kv_capacity_tokens)
        with suppress(PlannerError):
            self.pace = await asyncio.to_thread(self._pace_of, engine.pipeline)
