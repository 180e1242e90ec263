"""What a handover copies: which decoders go from which worker to which, and which token slots are still to be sent."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.layout import Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Decoders whose KV cache goes from one worker to another."""

    source: int
    target: int
    decoders: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One bounded copy: at most ``slice_bytes``."""

    route: Route
    decoders: list[int]
    slots: npt.NDArray[np.int32]


def routes_between(current: Pipeline, target: Pipeline, worker_of: dict[str, int]) -> tuple[Route, ...]:
    """Return the routes of a refactoring, each pair of workers once."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for decoder in range(current.num_decoders):
        source = worker_of[current.stage_of(decoder).device_ids[0]]
        destination = worker_of[target.stage_of(decoder).device_ids[0]]
        if source != destination:
            pairs.setdefault((source, destination), []).append(decoder)
    return tuple(Route(source=s, target=t, decoders=tuple(d)) for (s, t), d in sorted(pairs.items()))


def pieces_of(
    route: Route, slots: npt.NDArray[np.int64], *, decoder_slot_bytes: int, slice_bytes: int
) -> Iterator[Piece]:
    """Cut the copy of ``slots`` over a route into pieces, all decoders of a piece for the same slots."""
    group = max(1, min(len(route.decoders), slice_bytes // decoder_slot_bytes))
    for first in range(0, len(route.decoders), group):
        decoders = list(route.decoders[first : first + group])
        step = max(1, slice_bytes // (decoder_slot_bytes * len(decoders)))
        for start in range(0, len(slots), step):
            yield Piece(route=route, decoders=decoders, slots=slots[start : start + step].astype(np.int32))


class DirtySlots:
    """Token slots written since they were last sent. Slots of steps in flight count once their step has ended."""

    def __init__(self, *, num_slots: int, live: npt.NDArray[np.int64]) -> None:
        self._dirty = np.zeros(num_slots, dtype=np.bool_)
        self._dirty[live] = True

    def mark(self, slots: npt.NDArray[np.int64]) -> None:
        self._dirty[slots] = True

    @property
    def count(self) -> int:
        return int(np.count_nonzero(self._dirty))

    def take(self, live: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return what must be sent now, leaving nothing dirty; slots that no sequence needs any more are left out."""
        needed = np.zeros_like(self._dirty)
        needed[live] = True
        taken = np.flatnonzero(self._dirty & needed)
        self._dirty[:] = False
        return taken
