"""A search for a pipeline within given limits, depth first, by the prices of places and the bounds that they give."""

from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from planner.placement import PlacedStage
from planner.priced_paths import EPSILON, Values
from planner.reach import Reach

if TYPE_CHECKING:
    from planner.placement_search import Limits, PlacementSearch


class Descent:
    """A depth-first search for a pipeline of at most the wanted number of stages, cheapest continuation first."""

    def __init__(
        self, search: "PlacementSearch", limits: "Limits", reach: Reach, values: Values, *, nodes: int
    ) -> None:
        self.search, self.limits, self.reach, self.values = search, limits, reach, values
        self.able = reach.able
        self.problem, self.paths, self.kinds = search.problem, search.paths, search.kinds
        self.stage = self.paths.stage_prices(search.prices)
        self.most = self.problem.num_stages + EPSILON + values.fixed
        self.count = len(self.problem.pieces)
        self.nodes = nodes
        self.ended = True  # no branch was given up
        self.stages: tuple[PlacedStage, ...] | None = None
        self.chosen: list[int] = []
        self.used: set[str] = set()
        self.touched: dict[str, int] = {}
        self._seen: dict[tuple[frozenset[str], str], int] = {}
        self._by_class_kind = self._places_by_row()
        self.irregular = bool(self.problem.hops.pairs) or any(len(p.device_ids) > 1 for p in self.problem.places)

    def run(self) -> tuple[PlacedStage, ...] | None:
        """Return the stages that were found."""
        self._from(0, 0.0)
        return self.stages

    def _places_by_row(self) -> list[dict[str, list[int]]]:
        """Places of each row by host."""
        found: list[dict[str, list[int]]] = []
        for index, kind in self.paths.rows:
            hosts: dict[str, list[int]] = {}
            for host in self.kinds.hosts[index].hosts[: self.problem.num_stages + 1]:
                hosts[host] = [p for p in self.kinds.by_host[host] if self.kinds.of_place[p] == kind]
            found.append(hosts)
        return found

    def _from(self, piece: int, price: float) -> bool:
        if piece >= self.count:
            self.stages = self.search.filled_up(self.chosen, self.limits)
            self.ended = self.ended and self.stages is not None
            return self.stages is not None
        if len(self.chosen) >= self.problem.num_stages:
            return False
        if self.nodes <= 0 or self.search.left_s() <= 0:
            self.ended = False
            return False
        self.nodes -= 1
        last = self.problem.places[self.chosen[-1]].host if self.chosen else ""
        key = (frozenset(self.used), str(self.chosen[-1]) if self.irregular and self.chosen else last)
        if self._seen.get(key, -1) >= piece:
            return False
        self._seen[key] = piece
        for _, _, back, place, cost in sorted(self._continuations(piece, price)):
            self._take(place)
            if self._from(-back, price + cost):
                return True
            self._give_back(place)
        return False

    def _take(self, place: int) -> None:
        self.chosen.append(place)
        found = self.problem.places[place]
        self.used.update(found.device_ids)
        self.touched[found.host] = self.touched.get(found.host, 0) + 1

    def _give_back(self, place: int) -> None:
        self.chosen.pop()
        found = self.problem.places[place]
        self.used.difference_update(found.device_ids)
        self.touched[found.host] -= 1

    def _continuations(self, piece: int, price: float) -> Iterator[tuple[float, float, int, int, float]]:
        """Yield what may come next: (bound, less its share of the cheapest flow, less its end, place, price).

        A place that could have held pieces before this one, but not this one, may be a relay: a stage that takes none,
        until the cuts are made (``PricedPaths.values``).
        """
        paths, after = self.paths, self.values.after
        row, kind, state = paths.entry_row, paths.entry_kind, paths.entry_state
        if not self.chosen:
            ends = self.reach.from_start[kind]
            able = ends > 0
        else:
            ends = np.maximum(self.reach.network[kind, piece], self.reach.rack[kind, piece])
            ends = np.maximum(ends, self.reach.host[kind, piece])
            able = (ends > piece) | self.able[kind, piece]
        bounds = price + self.stage[row] + after[state, ends]
        for entry in np.flatnonzero((bounds <= self.most) & able):
            at = int(row[entry])
            share = self.search.shares.get((piece, at), 0.0)
            for place in self._candidates(at):
                end = self._end(place, int(kind[entry]), piece)
                bound = price + self.stage[at] + after[state[entry], end]
                if bound <= self.most:
                    yield round(float(bound), 4), -share, -end, place, float(self.stage[at])

    def _candidates(self, row: int) -> Iterator[int]:
        """Yield places of a row that differ by what is used of their hosts: of untouched hosts, one will do."""
        fresh = False
        for host, places in self._by_class_kind[row].items():
            touched = self.touched.get(host, 0) > 0
            if fresh and not touched:
                continue
            free = [place for place in places if self.used.isdisjoint(self.problem.places[place].device_ids)]
            yield from free if self.irregular else free[:1]
            fresh = fresh or (not touched and bool(free) and not self.problem.hops.pairs)

    def _end(self, place: int, kind: int, piece: int) -> int:
        if not self.chosen:
            return int(self.reach.from_start[kind])
        places = self.problem.places
        hop = self.problem.hops.between(places[self.chosen[-1]], places[place])
        row = self.search.costs.times[places[place].speed_class]
        by_time = bisect_right(row, row[piece] + self.limits.bottleneck_ns - hop) - 1
        return max(piece, min(by_time, int(self.reach.memory[kind, piece])))
