"""What a run of pieces costs on a place, from running sums: the common ground of bounds, search and model."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from planner.placement import PlacedStage, stage_kv_tokens
from planner.placement_problem import Place, PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Pieces ``first <= p < end`` on one place, with what they cost there, without the hop into it."""

    first: int
    end: int
    time_ns: int
    kv_tokens: int
    change_ns: int
    moved_bytes: int


class SegmentCosts:
    """Costs of any run of pieces on any place of a problem."""

    def __init__(self, problem: PlacementProblem) -> None:
        self.problem = problem
        self.times = [_sums(row) for row in problem.class_ns]
        self.weights = _sums([piece.weight_bytes for piece in problem.pieces])
        self.kv_rates = _sums([piece.kv_bytes_per_token for piece in problem.pieces])
        self._moving = _sums([piece.weight_bytes + piece.live_kv_bytes for piece in problem.pieces])
        self._held_moving: dict[int, list[int]] = {}
        self._adding: dict[int, list[int] | None] = {}
        self._fits: dict[tuple[int, int, int], list[int]] = {}

    def time_ns(self, place: int, first: int, end: int) -> int:
        """Return the time of the pieces there, in nanoseconds."""
        row = self.times[self.problem.places[place].speed_class]
        return row[end] - row[first]

    def kv_tokens(self, place: int, first: int, end: int) -> int:
        """Return as ``placement.stage_kv_tokens`` does."""
        room = self.problem.places[place].room_bytes
        whole = end - first == len(self.problem.pieces)
        weights = self._to_add(place) if self.problem.places[place].held else self.weights
        if weights is None or (whole and self.problem.tied_bytes):
            return stage_kv_tokens(self.problem, PlacedStage(place=place, first=first, end=end))
        left, rate = room - weights[end] + weights[first], self.kv_rates[end] - self.kv_rates[first]
        if left < 0:
            return -1
        if self.problem.kv_budget_bytes is not None:
            left = self.problem.kv_budget_bytes
        return min(left // rate, self.problem.useful_kv_tokens) if rate else self.problem.useful_kv_tokens

    def _to_add(self, place: int) -> list[int] | None:
        """Return running sums of the weights that a place does not hold yet; None where it holds KV cache, too."""
        if place not in self._adding:
            held = self.problem.places[place].held
            missing = [piece.weight_bytes - held.get(index, 0) for index, piece in enumerate(self.problem.pieces)]
            self._adding[place] = _sums(missing) if min(missing) >= 0 else None
        return self._adding[place]

    def fits_until(self, place: int, kv_tokens: int) -> list[int]:
        """Return by first piece the end of the longest run that fits with KV cache for ``kv_tokens``."""
        held = self.problem.places[place].held
        key = (self.problem.places[place].room_bytes, kv_tokens, place if held else -1)
        if key not in self._fits:
            tokens = self.problem.tokens_in_room(kv_tokens)
            needs = [
                max(0, piece.weight_bytes + tokens * piece.kv_bytes_per_token - held.get(index, 0))
                for index, piece in enumerate(self.problem.pieces)
            ]
            sums = _sums(needs)
            ends = [bisect_right(sums, so_far + key[0]) - 1 for so_far in sums]
            self._fits[key] = [min(pair) for pair in zip(ends, self.within_budget(kv_tokens), strict=True)]
        return self._fits[key]

    def within_budget(self, kv_tokens: int) -> list[int]:
        """Return by first piece the end of the longest run whose budget holds so many tokens."""
        budget = self.problem.kv_budget_bytes
        if budget is None or not kv_tokens:
            return [len(self.problem.pieces)] * len(self.kv_rates)
        rate = budget // kv_tokens
        return [bisect_right(self.kv_rates, so_far + rate) - 1 for so_far in self.kv_rates]

    def moved_bytes(self, place: int, first: int, end: int) -> int:
        """Return the bytes that have to come."""
        held = self.problem.places[place].held
        sums = self._moving
        if held:
            if place not in self._held_moving:
                pieces = enumerate(self.problem.pieces)
                sizes = [0 if p in held else piece.weight_bytes + piece.live_kv_bytes for p, piece in pieces]
                self._held_moving[place] = _sums(sizes)
            sums = self._held_moving[place]
        return sums[end] - sums[first]

    def change_ns(self, place: int, moved_bytes: int) -> int:
        """Return what it costs to bring so many bytes there."""
        if moved_bytes == 0:
            return 0
        rate = self.problem.places[place].arrival_bytes_per_s
        return -(-moved_bytes * 1_000_000_000 // rate) + self.problem.risk_ns

    def of(self, place: int, *, bottleneck_ns: int, kv_tokens: int) -> Iterator[Segment]:
        """Yield the runs that a stage on ``place`` may have within these limits, whatever comes before it."""
        count = len(self.problem.pieces)
        row = self.times[self.problem.places[place].speed_class]
        spare = self.problem.num_stages - 1  # pieces that the other stages need at least
        for first in range(count):
            hop = self.cheapest_hops[place] if first else 0
            last = min(bisect_right(row, row[first] + bottleneck_ns - hop) - 1, count - max(0, spare - first))
            for end in range(first + 1, last + 1):
                if spare == 0 and end < count:
                    continue
                tokens = self.kv_tokens(place, first, end)
                if tokens < kv_tokens:
                    break
                moved = self.moved_bytes(place, first, end)
                yield Segment(
                    first=first,
                    end=end,
                    time_ns=row[end] - row[first],
                    kv_tokens=tokens,
                    change_ns=self.change_ns(place, moved),
                    moved_bytes=moved,
                )

    def least_moved_bytes(self) -> int:
        """Return the bytes that move in any placement: those of pieces that no place holds."""
        held = {piece for place in self.problem.places for piece in place.held}
        pieces = enumerate(self.problem.pieces)
        return sum(piece.weight_bytes + piece.live_kv_bytes for index, piece in pieces if index not in held)

    def least_change_ns(self) -> int:
        """Return the least that bringing those bytes costs."""
        moved = self.least_moved_bytes()
        fastest = max(place.arrival_bytes_per_s for place in self.problem.places)
        empty = not any(place.held for place in self.problem.places)
        stages = self.problem.num_stages if empty else min(1, moved)
        return -(-moved * 1_000_000_000 // fastest) + stages * self.problem.risk_ns

    @cached_property
    def cheapest_hops(self) -> list[int]:
        """The nanoseconds of the cheapest hop into each place, from any place that can stand before it."""
        return cheapest_hops(self.problem)


def cheapest_hops(problem: PlacementProblem) -> list[int]:
    """Return the cheapest hop into each place. Links of hosts and racks are asked for once, single links each."""
    hops, places = problem.hops, problem.places
    hosts: dict[str, set[str]] = {}
    racks: dict[str, set[str]] = {}
    for place in places:
        hosts.setdefault(place.host, set()).update(place.device_ids)
        racks.setdefault(place.rack, set()).update(place.device_ids)
    best = []
    for place in places:
        options = [hops.network_ns]
        if place.host in hops.same_host_ns and not hosts[place.host] <= set(place.device_ids):
            options.append(hops.same_host_ns[place.host])
        if place.rack in hops.same_rack_ns and not racks[place.rack] <= set(place.device_ids):
            options.append(hops.same_rack_ns[place.rack])
        best.append(min(options))
    number = {place.name: index for index, place in enumerate(places)}
    single = {link: ns for link, ns in hops.pairs.items() if link[0] in number and link[1] in number}
    if single and len(single) >= len(places) * (len(places) - 1):  # every link is single: the rest plays no part
        best = [max(single.values())] * len(places)
    for (_, target), ns in single.items():
        best[number[target]] = min(best[number[target]], ns)
    return best


def _sums(values: Sequence[int]) -> list[int]:
    return list(accumulate(values, initial=0))


def within(place: Place, devices: frozenset[str]) -> bool:
    """Say whether a place touches any of these devices."""
    return not devices.isdisjoint(place.device_ids)
