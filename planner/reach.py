"""How far each kind of place reaches: the end of the longest stage from every first piece, within limits.

Places alike in speed, room and hops are one kind, and hosts alike in the kinds they have are one class of hosts: a
cluster of thousands of devices comes down to some hundred kinds. Everything that follows works on these arrays.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.placement_problem import KV_UNLIMITED, Place, PlacementProblem
from planner.segments import SegmentCosts

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Places that a stage cannot tell apart; ``width`` is the number of devices of each."""

    speed_class: int
    room_bytes: int
    width: int
    network_ns: int  # the hop into it from anywhere, from its rack, from its host; a lower bound where links differ
    rack_ns: int
    host_ns: int | None  # None: nothing is nearer than the rack
    held: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostClass:
    """Hosts alike in all their places: ``kinds`` with the number of each on one host."""

    rack: str
    kinds: tuple[tuple[int, int], ...]
    hosts: tuple[str, ...]
    devices: int  # on one host that have room for a piece at all

    def count(self, kind: int) -> int:
        """Return the places of a kind on all hosts together."""
        return dict(self.kinds)[kind] * len(self.hosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class KindTable:
    """Kinds of places, and the classes of hosts that have them."""

    kinds: Sequence[Kind]
    hosts: Sequence[HostClass]


class Kinds:
    """The kinds of places and the classes of hosts of a problem."""

    def __init__(self, problem: PlacementProblem) -> None:
        self.problem = problem
        self.of_place: list[int] = []
        numbers: dict[Kind, int] = {}
        nearest = _nearest_pairs(problem)
        for place in problem.places:
            kind = _kind(problem, place, nearest.get(place.name))
            self.of_place.append(numbers.setdefault(kind, len(numbers)))
        self.kinds = list(numbers)
        self.has_room = [_has_room(problem, kind) for kind in self.kinds]  # for any piece
        self.by_host: dict[str, list[int]] = {}
        for index, place in enumerate(problem.places):
            self.by_host.setdefault(place.host, []).append(index)
        self.hosts = self._classes()
        self.class_of_host = {host: index for index, found in enumerate(self.hosts) for host in found.hosts}
        self.table = KindTable(kinds=self.kinds, hosts=self.hosts)
        self.entries: dict[tuple[int, int], int] = {}  # speed class and hop into the stage: kinds have few together
        self.network_entry = self._entries(lambda kind: kind.network_ns)
        self.rack_entry = self._entries(lambda kind: kind.rack_ns)
        self.host_entry = self._entries(lambda kind: kind.rack_ns if kind.host_ns is None else kind.host_ns)
        self.start_entry = self._entries(lambda _: 0)

    def _entries(self, hop: Callable[[Kind], int]) -> Ints:
        """Return the number of each kind's entry."""
        keys = [(kind.speed_class, hop(kind)) for kind in self.kinds]
        return np.asarray([self.entries.setdefault(key, len(self.entries)) for key in keys])

    def _classes(self) -> list[HostClass]:
        classes: dict[tuple[str, int, tuple[tuple[int, int], ...]], list[str]] = {}
        racks = self.problem.hops.same_rack_ns
        for host, places in self.by_host.items():
            roomy = [place for place in places if self.has_room[self.of_place[place]]]
            devices = len({device for place in roomy for device in self.problem.places[place].device_ids})
            rack = self.problem.places[places[0]].rack
            counts = Counter(self.of_place[place] for place in places)
            key = (rack if rack in racks else "", devices, tuple(sorted(counts.items())))
            classes.setdefault(key, []).append(host)
        return [
            HostClass(rack=rack, devices=devices, kinds=kinds, hosts=tuple(hosts))
            for (rack, devices, kinds), hosts in classes.items()
        ]


def _kind(problem: PlacementProblem, place: Place, nearest: int | None) -> Kind:
    hops = problem.hops
    network = hops.network_ns
    rack = hops.same_rack_ns.get(place.rack, network)
    host = hops.same_host_ns.get(place.host)
    if nearest is not None:
        network, rack = min(network, nearest), min(rack, nearest)
        host = min(rack if host is None else host, nearest)
    return Kind(
        speed_class=place.speed_class,
        room_bytes=place.room_bytes + (problem.tied_bytes if problem.num_stages == 1 else 0),
        width=len(place.device_ids),
        network_ns=network,
        rack_ns=min(rack, network),
        host_ns=None if host is None or host >= min(rack, network) else host,
        held=tuple(sorted(place.held.items())),
    )


def _has_room(problem: PlacementProblem, kind: Kind) -> bool:
    held = dict(kind.held)
    return any(
        max(0, problem.least_bytes(piece) - held.get(index, 0)) <= kind.room_bytes
        and problem.is_within_budget(piece.kv_bytes_per_token, problem.min_kv_tokens)
        for index, piece in enumerate(problem.pieces)
    )


def _nearest_pairs(problem: PlacementProblem) -> dict[str, int]:
    found: dict[str, int] = {}
    for (_, target), ns in problem.hops.pairs.items():
        found[target] = min(ns, found.get(target, ns))
    return found


class Reach:
    """The end of the longest stage of each kind from each first piece, never less than that piece.

    Rows are kinds, columns first pieces; ``entered`` is by the hop into the stage: from the network, rack or host.
    ``from_start`` is the reach of a first stage, which nothing has to hop into.
    """

    def __init__(self, kinds: Kinds, costs: SegmentCosts, *, bottleneck_ns: int, memory: Ints) -> None:
        self.memory = memory
        times = [np.asarray(row, dtype=np.int64) for row in costs.times]
        by_time = np.stack(
            [
                np.searchsorted(times[speed_class], times[speed_class] + (bottleneck_ns - hop), side="right") - 1
                for speed_class, hop in kinds.entries
            ]
        )
        floor = np.arange(len(times[0]))
        self.network = np.maximum(np.minimum(memory, by_time[kinds.network_entry]), floor)
        self.rack = np.maximum(np.minimum(memory, by_time[kinds.rack_entry]), floor)
        self.host = np.maximum(np.minimum(memory, by_time[kinds.host_entry]), floor)
        self.from_start = np.maximum(np.minimum(memory[:, 0], by_time[kinds.start_entry, 0]), 0)

    @property
    def able(self) -> NDArray[np.bool_]:
        """Whether a kind can hold any single piece up to each piece, by the nearest hop."""
        found: NDArray[np.bool_] = np.maximum.accumulate(self.host > np.arange(self.host.shape[1]), axis=1)
        return found

    def of_kinds(self, kinds: Sequence[int]) -> "Reach":
        """Return the same for some of the kinds only."""
        some = copy(self)
        some.memory, some.network, some.rack = self.memory[kinds], self.network[kinds], self.rack[kinds]
        some.host, some.from_start = self.host[kinds], self.from_start[kinds]
        return some


@dataclass(frozen=True, slots=True, kw_only=True)
class Collapse:
    """Kinds and classes that are alike within some limits, taken together; those of no use are left out (-1)."""

    table: KindTable
    reach: Reach
    of_kind: tuple[int, ...]
    of_class: tuple[int, ...]


def collapse(kinds: Kinds, reach: Reach) -> Collapse:
    """Take together what reaches equally far: near the best limits, memory makes no difference on most devices."""
    of_kind, chosen = _kinds_alike(kinds, reach)
    of_class, hosts = _classes_alike(kinds, of_kind)
    return Collapse(
        table=KindTable(kinds=[kinds.kinds[index] for index in chosen], hosts=hosts),
        reach=reach.of_kinds(chosen),
        of_kind=tuple(of_kind),
        of_class=tuple(of_class),
    )


def _kinds_alike(kinds: Kinds, reach: Reach) -> tuple[list[int], list[int]]:
    """Return the number of each kind among those that differ, -1 for one of no use, and the first of each number."""
    pieces = np.arange(reach.network.shape[1])
    useful = (reach.host > pieces).any(axis=1) | (reach.from_start > 0)
    of_kind: list[int] = []
    chosen: list[int] = []
    numbers: dict[tuple[bytes, int, bool], int] = {}
    for index, kind in enumerate(kinds.kinds):
        if not useful[index]:
            of_kind.append(-1)
            continue
        rows = np.concatenate([reach.network[index], reach.rack[index], reach.host[index], [reach.from_start[index]]])
        key = (rows.tobytes(), kind.width, kind.host_ns is None)
        if key not in numbers:
            numbers[key] = len(chosen)
            chosen.append(index)
        of_kind.append(numbers[key])
    return of_kind, chosen


def _classes_alike(kinds: Kinds, of_kind: list[int]) -> tuple[list[int], list[HostClass]]:
    """Return the number of each class of hosts among those that differ, -1 for one of no use, and those classes."""
    classes: dict[tuple[str, int, tuple[tuple[int, int], ...]], list[str]] = {}
    of_class = []
    for host in kinds.hosts:
        counts: Counter[int] = Counter()
        for index, count in host.kinds:
            counts[of_kind[index]] += count
        alone = all(kinds.kinds[index].width == 1 for index, _ in host.kinds)
        dropped = sum(count for index, count in host.kinds if of_kind[index] < 0 and kinds.has_room[index])
        devices = host.devices - (dropped if alone else 0)
        del counts[-1]
        if not counts:
            of_class.append(-1)
            continue
        signature = (host.rack, devices, tuple(sorted(counts.items())))
        of_class.append(list(classes).index(signature) if signature in classes else len(classes))
        classes.setdefault(signature, []).extend(host.hosts)
    hosts = [
        HostClass(rack=rack, devices=devices, kinds=found, hosts=tuple(names))
        for (rack, devices, found), names in classes.items()
    ]
    return of_class, hosts


def memory_reach(kinds: Kinds, costs: SegmentCosts, *, kv_tokens: int) -> Ints:
    """Return how far the memory of each kind reaches with KV cache for ``kv_tokens``, rows as in ``Reach``."""
    tokens = kinds.problem.tokens_in_room(min(kv_tokens, KV_UNLIMITED))
    within_budget = np.maximum(costs.within_budget(kv_tokens), np.arange(len(costs.weights)))
    plain = [weight + tokens * rate for weight, rate in zip(costs.weights, costs.kv_rates, strict=True)]
    sums = np.asarray(plain, dtype=np.float64) if plain[-1] >= 2**62 else np.asarray(plain, dtype=np.int64)
    slack = 0 if sums.dtype == np.int64 else int(plain[-1] * 1e-12) + 1  # a bound, so rather too far than too short
    rows = []
    for kind in kinds.kinds:
        row = sums
        if kind.held:
            held = np.zeros(len(sums) - 1, dtype=sums.dtype)
            held[[piece for piece, _ in kind.held]] = [size for _, size in kind.held]
            row = np.concatenate([sums[:1], np.cumsum(np.maximum(0, np.diff(sums) - held))])
        ends = np.searchsorted(row, row + max(-1, kind.room_bytes) + slack, side="right") - 1
        ends = np.maximum(ends, np.arange(len(row))) if kind.room_bytes >= 0 else np.arange(len(row))
        rows.append(np.minimum(ends, within_budget))
    return np.stack(rows).astype(np.int64)


def bottleneck_candidates(kinds: Kinds, costs: SegmentCosts) -> Ints:
    """Return all times that a stage with the hop into it may take, sorted: the optimum is one of them.

    Where single links have times of their own, each of these is a hop, too.
    """
    hops = {0, kinds.problem.hops.network_ns, *kinds.problem.hops.pairs.values()}
    hops |= set(kinds.problem.hops.same_host_ns.values()) | set(kinds.problem.hops.same_rack_ns.values())
    count = len(kinds.problem.pieces)
    upper = np.triu_indices(count + 1, 1)
    spans = [np.asarray(row, dtype=np.int64) for row in {tuple(row) for row in costs.times}]
    runs = np.concatenate([row[upper[1]] - row[upper[0]] for row in spans])
    values: Ints = np.sort(np.concatenate([runs + hop for hop in sorted(hops)]))  # faster than unique() of numpy
    found: Ints = values[np.concatenate([[True], values[1:] != values[:-1]])]
    return found
