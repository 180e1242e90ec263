"""Which layers' parameters stay in the memory of a host: by a budget, and by when each was last of use. Pure.

A layer is in use while a stage has it, and idle afterwards; it stays until the room is wanted:

    comes --> in use --left--> idle --taken--> in use
                                 +--room wanted, longest idle first--> gone

What is in use is never given up: its memory would stay with the stage, and the next start would find nothing. So a new
layer for which idle ones do not make enough room is not kept, and a model larger than the budget keeps the layers that
came first, rather than all of them for a moment.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

_SHARE: Final = 4  # with half of a host's memory for what computes on it, a quarter stays for everything else


def default_budget_bytes(host_bytes: int, *, others_bytes: int = 0) -> int:
    """Return what parameters may take of a host's memory: a quarter, and no more than what others leave."""
    return max(0, min(host_bytes // _SHARE, host_bytes - others_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLayer:
    """Parameters of one layer, as one engine has them. ``users``: stages that have it now.

    ``key`` says whose and in which form, ``name`` which layer, for people, and ``of`` of which model.
    """

    key: str
    name: str
    num_bytes: int
    of: str = ""
    users: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLayers:
    """Everything that is kept, of which the layer that was of no use for longest comes first."""

    layers: tuple[KeptLayer, ...] = ()

    @property
    def held_bytes(self) -> int:
        return sum(each.num_bytes for each in self.layers)

    @property
    def idle_bytes(self) -> int:
        """What could be given up."""
        return sum(each.num_bytes for each in self.layers if not each.users)

    def bytes_of(self, model: str) -> int:
        return sum(each.num_bytes for each in self.layers if each.of == model)

    def find(self, key: str) -> KeptLayer | None:
        return next((each for each in self.layers if each.key == key), None)

    def without(self, key: str) -> "KeptLayers":
        return KeptLayers(layers=tuple(each for each in self.layers if each.key != key))


def added(kept: KeptLayers, new: KeptLayer, *, budget_bytes: int) -> tuple[KeptLayers, tuple[str, ...]] | None:
    """Return what is kept with a new layer in use, and the keys that went for it; None: there is no room.

    Raises:
        ValueError: It is kept already.
    """
    if kept.find(new.key) is not None:
        raise ValueError(f"{new.name} is kept already")
    missing = kept.held_bytes + new.num_bytes - budget_bytes
    if missing > kept.idle_bytes:
        return None
    rest, gone = given_up(kept, num_bytes=missing)
    return KeptLayers(layers=(*rest.layers, new)), gone


def taken(kept: KeptLayers, key: str) -> KeptLayers:
    """Return what is kept when one more stage has a layer."""
    return _used(kept, key, +1)


def left(kept: KeptLayers, key: str) -> KeptLayers:
    """Return what is kept when a stage lets go of a layer: of all idle ones it goes last. One that is gone stays so."""
    return _used(kept, key, -1)


def _used(kept: KeptLayers, key: str, change: int) -> KeptLayers:
    found = kept.find(key)
    if found is None:
        return kept
    users = max(0, found.users + change)
    return KeptLayers(layers=(*kept.without(key).layers, replace(found, users=users)))


def given_up(kept: KeptLayers, *, num_bytes: int) -> tuple[KeptLayers, tuple[str, ...]]:
    """Return what is kept after at least so much was given up, or all that is idle; and the keys that went."""
    gone = tuple(_longest_idle(kept, num_bytes))
    return KeptLayers(layers=tuple(each for each in kept.layers if each.key not in gone)), gone


def _longest_idle(kept: KeptLayers, num_bytes: int) -> Iterator[str]:
    freed = 0
    for each in kept.layers:
        if freed >= num_bytes:
            return
        if not each.users:
            freed += each.num_bytes
            yield each.key
