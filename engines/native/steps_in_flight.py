"""The steps that the stages have been sent and have not ended, and who waits until there is none."""

import asyncio
from collections.abc import Iterator

from engines.native.batch import Batch
from engines.native.sequence import Sequence


class StepsInFlight:
    """Those of one generation of roles. What is void with an older one is not waited for."""

    def __init__(self) -> None:
        self._generation = 0
        self._batches: dict[int, tuple[Batch, float]] = {}  # by step, with when it was dispatched
        self._drained: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def generation(self) -> int:
        """The number that steps and roles carry; results of another one are void."""
        return self._generation

    @property
    def sequences(self) -> Iterator[Sequence]:
        """Those that a step in flight computes, one that is in several steps as often."""
        return (entry.sequence for batch, _ in self._batches.values() for entry in batch.entries)

    @property
    def oldest_s(self) -> float | None:
        """When the oldest was dispatched; None: there is none."""
        return min((dispatched_s for _, dispatched_s in self._batches.values()), default=None)

    def dispatched(self, batch: Batch, *, now_s: float) -> None:
        """The stages have been sent a step."""
        self._batches[batch.step_id] = batch, now_s

    def ended(self, step_id: int, *, generation: int) -> Batch | None:
        """Take in that a step has ended, and return what it computed; None: it is void."""
        if generation != self._generation:
            return None
        batch, _ = self._batches.pop(step_id)
        self._tell_drained()
        return batch

    def void(self) -> None:
        """Begin another generation: whatever is still under way counts no more."""
        self._generation += 1
        self._batches.clear()
        self._tell_drained()

    async def drained(self) -> None:
        """Return when there is none. Nothing may be dispatched meanwhile."""
        if self._batches:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained
            self._drained = None

    def _tell_drained(self) -> None:
        if self._drained is not None and not self._batches and not self._drained.done():
            self._drained.set_result(None)
