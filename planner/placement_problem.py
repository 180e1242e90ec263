"""What the placement solver is asked: pieces of a model, places that may carry a stage, and what lies between them.

Plain integers throughout (nanoseconds, bytes, tokens, penalty points), so that every comparison is exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

KV_UNLIMITED = 1 << 40  # tokens, where nothing of a stage has a KV cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The layers between two neighbouring legal cuts; the ends of the model lie with the first and the last piece."""

    weight_bytes: int
    kv_bytes_per_token: int
    live_kv_bytes: int = 0  # KV cache in use now, which moves with the piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A device, or a tensor-parallel group of devices, that may carry one stage.

    ``held`` is what the layout in force has here: bytes by piece, which a stage with that piece need not add.
    ``free_bytes`` counts what is free beside it, pooled over the devices of a group.
    """

    name: str
    device_ids: tuple[str, ...]  # places that share one exclude each other
    speed_class: int  # row of ``PlacementProblem.class_ns``
    free_bytes: int
    fixed_bytes: int = 0  # activations, workspace and headroom of a stage
    host: str = ""
    rack: str = ""
    island: str = ""  # devices that one NVLink domain joins; a group never reaches beyond it
    held: Mapping[int, int] = field(default_factory=dict)
    arrival_bytes_per_s: int = 1_000_000_000  # at which pieces come here from where they are

    @property
    def room_bytes(self) -> int:
        """What a stage may add in weights and KV cache."""
        return self.free_bytes - self.fixed_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Hops:
    """Time of one hop between neighbouring stages, by the link between their places; the first match counts.

    ``pairs`` names single links (from, to) by the names of the places, ``same_host_ns`` and ``same_rack_ns`` hosts
    and racks whose inner links are alike.
    """

    network_ns: int
    same_host_ns: Mapping[str, int] = field(default_factory=dict)
    same_rack_ns: Mapping[str, int] = field(default_factory=dict)
    pairs: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def between(self, origin: Place, target: Place) -> int:
        """Return the nanoseconds of a hop from ``origin`` to ``target``."""
        pair = self.pairs.get((origin.name, target.name)) if self.pairs else None
        if pair is not None:
            return pair
        if origin.host == target.host and origin.host in self.same_host_ns:
            return self.same_host_ns[origin.host]
        if origin.rack == target.rack and origin.rack in self.same_rack_ns:
            return self.same_rack_ns[origin.rack]
        return self.network_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """Penalty points for touching any of these devices, once: a whole GPU, a whole island, a device shared with others.

    Source of the penalty on shared devices: FlexPipe, Eq 9, ``gamma0 * (1 + alpha * CV^2)``.
    """

    device_ids: frozenset[str]
    points: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementProblem:
    """One pipeline to place.

    Aims, each within what the earlier ones reached: the smallest bottleneck (stage time and the hop into it) within
    1 %, the largest KV capacity of the smallest stage within 1 %, the least cost of the change, the least
    fragmentation, the fewest bytes moved.

    Raises:
        ValueError: The parts do not belong together.
    """

    pieces: tuple[Piece, ...]
    class_ns: tuple[tuple[int, ...], ...]  # time of each piece, by speed class
    places: tuple[Place, ...]
    num_stages: int
    hops: Hops
    min_kv_tokens: int = 0  # that each stage can hold at least
    useful_kv_tokens: int = KV_UNLIMITED  # KV capacity beyond this is of no use, and counts as this
    kv_budget_bytes: int | None = None  # of a stage for its KV cache alone; None: that takes what its weights leave
    latency_limit_ns: int | None = None  # on all stages and hops together
    charges: tuple[Charge, ...] = ()
    risk_ns: int = 0  # what a stage costs that has to receive anything, besides the time of its bytes
    fixed_order: bool = False  # stages follow the places, from the first to the last; places between may stay empty
    tied_bytes: int = 0  # counted once where one stage holds both ends

    def __post_init__(self) -> None:
        if not self.pieces or self.num_stages < 1:
            raise ValueError("a problem has at least one piece and one stage")
        if any(len(row) != len(self.pieces) for row in self.class_ns):
            raise ValueError("each speed class has a time for each piece")
        if any(not 0 <= place.speed_class < len(self.class_ns) for place in self.places):
            raise ValueError("a place has a speed class that is not there")
        if len({place.name for place in self.places}) != len(self.places):
            raise ValueError("names of places are distinct")
        if not 0 <= self.min_kv_tokens <= self.useful_kv_tokens <= KV_UNLIMITED:
            raise ValueError("the KV capacity that is needed is at most that of use")
        if any(piece.weight_bytes < 0 or piece.kv_bytes_per_token < 0 for piece in self.pieces):
            raise ValueError("bytes are not negative")
        self._refuse_torn_groups()

    def tokens_in_room(self, tokens: int) -> int:
        """Return for how many of these the KV cache is in the room of a place: for none where it has a budget."""
        return tokens if self.kv_budget_bytes is None else 0

    def least_bytes(self, piece: Piece) -> int:
        """Return what a piece takes of the room of a place, with the least KV capacity."""
        return piece.weight_bytes + self.tokens_in_room(self.min_kv_tokens) * piece.kv_bytes_per_token

    def is_within_budget(self, kv_bytes_per_token: int, tokens: int) -> bool:
        """Say whether the budget of a stage holds so many tokens."""
        return self.kv_budget_bytes is None or kv_bytes_per_token * tokens <= self.kv_budget_bytes

    def _refuse_torn_groups(self) -> None:
        """A group is of distinct devices of one island of one host."""
        homes = {place.device_ids[0]: (place.host, place.island) for place in self.places if len(place.device_ids) == 1}
        for place in self.places:
            home = (place.host, place.island)
            torn = any(homes.get(device, home) != home for device in place.device_ids)
            if torn or len(set(place.device_ids)) != len(place.device_ids) or not place.device_ids:
                raise ValueError(f"the devices of {place.name} are not distinct devices of one island")


def merged(problem: PlacementProblem, cuts: Sequence[int]) -> PlacementProblem:
    """Return the problem with only these cuts left: pieces between them become one. Cuts count pieces."""
    bounds = (0, *cuts, len(problem.pieces))
    ranges = list(pairwise(bounds))
    return replace(
        problem,
        pieces=tuple(
            Piece(
                weight_bytes=sum(piece.weight_bytes for piece in problem.pieces[first:end]),
                kv_bytes_per_token=sum(piece.kv_bytes_per_token for piece in problem.pieces[first:end]),
                live_kv_bytes=sum(piece.live_kv_bytes for piece in problem.pieces[first:end]),
            )
            for first, end in ranges
        ),
        class_ns=tuple(tuple(sum(row[first:end]) for first, end in ranges) for row in problem.class_ns),
        places=tuple(replace(place, held=_merged_held(place.held, ranges)) for place in problem.places),
    )


def _merged_held(held: Mapping[int, int], ranges: Sequence[tuple[int, int]]) -> dict[int, int]:
    """A merged piece counts as held where all of its parts are."""
    return {
        index: sum(held[piece] for piece in range(first, end))
        for index, (first, end) in enumerate(ranges)
        if all(piece in held for piece in range(first, end))
    }
