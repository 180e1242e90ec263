"""Looks for a pipeline within given limits, and proves where it can that there is none.

The question "is there a pipeline whose stages take at most this long and hold at least this much KV cache" is asked
many times, for limits that close in on the best. An answer is stages, a proof that there are none (a bound on priced
paths, or a search that ended), or neither.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from planner.alike import Alike
from planner.descent import Descent
from planner.placement import PlacedStage, score
from planner.placement_problem import PlacementProblem
from planner.priced_paths import EPSILON, PricedPaths, Shares, Values
from planner.reach import Floats, Ints, Kinds, Reach, collapse, memory_reach
from planner.segments import Segment, SegmentCosts
from planner.solver import Outcome
from planner.split import best_split

_WINDOW = 1.0  # stages beyond the number wanted that a pipeline may have to play a part in the prices
_ROUNDS = 4  # of the linear program, with stages that its last prices make cheap
_CLOSE = 0.01  # stages between a bound and the cost of the flow that it is from
_S_PER_ARC = 1e-5  # what the linear program takes on any machine of today
_WHOLE_SHARE = 0.6  # of the time that is left, for one search for a whole path
_LOOK_NODES = 400  # of a search tree, before it is given up
_SPARE_TRIES = 40  # places tried to fill up a pipeline of too few stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What each stage has to keep."""

    bottleneck_ns: int
    kv_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The answer for some limits: stages, or a proof that there are none, or neither."""

    stages: tuple[PlacedStage, ...] | None = None
    impossible: bool = False


class PlacementSearch:
    """Answers such questions for one problem. Prices that proved something are where the next question begins."""

    def __init__(self, problem: PlacementProblem, *, left_s: Callable[[], float]) -> None:
        self.problem = problem
        self.costs = SegmentCosts(problem)
        self.kinds = Kinds(problem)
        self.paths = PricedPaths(self.kinds.table)
        self.prices: Floats = np.zeros(self.paths.num_prices)
        self.shares: Shares = {}  # of the last flow, which tells where to look first
        self.left_s = left_s
        self._memory: dict[int, Ints] = {}

    def reach(self, limits: Limits) -> Reach:
        """Return how far each kind of place reaches within limits."""
        memory = self._memory.get(limits.kv_tokens)
        if memory is None:
            memory = memory_reach(self.kinds, self.costs, kv_tokens=limits.kv_tokens)
            if len(self._memory) > 64:
                self._memory.clear()
            self._memory[limits.kv_tokens] = memory
        return Reach(self.kinds, self.costs, bottleneck_ns=limits.bottleneck_ns, memory=memory)

    def is_impossible(self, limits: Limits, *, improve: bool = True) -> bool:
        """Say whether it is proven that no pipeline keeps ``limits``."""
        return self._bound(self.reach(limits), improve=improve).total > self.problem.num_stages + EPSILON

    def look(self, limits: Limits, *, improve: bool = True, nodes: int = _LOOK_NODES) -> Look:
        """Look for a pipeline within ``limits``.

        With the prices that are known first; where they tell nothing, with the best there are (``improve``).

        1. A bound above the number of stages is a proof that there is none.
        2. A search along cheap paths finds one, or ends, which is a proof as well, or is given up.

        A pipeline of too few stages is filled up with places to spare; where that fails the search goes on, but
        its end proves nothing any more.
        """
        reach = self.reach(limits)
        for better in (False, True)[: 1 + improve]:
            values = self._bound(reach, improve=better)
            if values.total > self.problem.num_stages + EPSILON:  # 1
                return Look(impossible=True)
            look = self._descend(limits, reach, values, nodes=nodes if better else nodes // 4)  # 2
            if look.impossible or look.stages is not None:
                return look
        return Look()

    def _descend(self, limits: Limits, reach: Reach, values: Values, *, nodes: int) -> Look:
        descent = Descent(self, limits, reach, values, nodes=nodes)
        stages = descent.run()
        return Look(stages=stages, impossible=stages is None and descent.ended)

    def look_whole(self, limits: Limits) -> Look:
        """Ask for a whole path over kinds, which is the problem but for which hosts are one and the same.

        What takes longest, and tells most: SCIP finds a path or proves that there is none.
        """
        reach = self.reach(limits)
        values = self._bound(reach, improve=True)
        if values.total > self.problem.num_stages + EPSILON:
            return Look(impossible=True)
        alike = self._collapsed(reach)
        prices = alike.narrow(self.prices)
        outcome, shares = alike.paths.whole_path(
            alike.reach, prices, most=self.problem.num_stages, limit_s=self.left_s() * _WHOLE_SHARE
        )
        if outcome is Outcome.INFEASIBLE:
            return Look(impossible=True)
        if not shares:
            return Look()
        self.shares = alike.spread(shares)
        return self._descend(limits, reach, values, nodes=_LOOK_NODES)

    def num_runs(self, limits: Limits, places: Sequence[int]) -> int:
        """Return how many segments these places together may carry within limits, before bounds rule any out."""
        reach = self.reach(limits)
        lengths = np.maximum(reach.host, reach.network) - np.arange(reach.network.shape[1])
        return int(lengths.sum(axis=1)[[self.kinds.of_place[place] for place in places]].sum())

    def segments(self, limits: Limits) -> dict[int, list[Segment]]:
        """Return what each place may carry in a pipeline within ``limits``: all that no bound rules out."""
        reach = self.reach(limits)
        values, arrivals = self._bound(reach, improve=False), self.paths.arrivals(reach, self.prices)
        stage = self.paths.stage_prices(self.prices)
        entry_of = {self.paths.rows[row]: entry for entry, row in enumerate(self.paths.entry_row)}
        most = self.problem.num_stages + EPSILON + values.fixed
        found: dict[int, list[Segment]] = {}
        for place, kind in enumerate(self.kinds.of_place):
            entry = entry_of[self.kinds.class_of_host[self.problem.places[place].host], kind]
            price, after = stage[self.paths.entry_row[entry]], values.after[self.paths.entry_state[entry]]
            if (arrivals[:-1] + price > most).all():
                continue
            runs = self.costs.of(place, bottleneck_ns=limits.bottleneck_ns, kv_tokens=limits.kv_tokens)
            found[place] = [run for run in runs if arrivals[run.first] + price + after[run.end] <= most]
        return found

    def _bound(self, reach: Reach, *, improve: bool) -> Values:
        above = self.problem.num_stages
        values = self.paths.values(reach, self.prices)
        if values.total > above + EPSILON or not improve:
            return values
        alike = self._collapsed(reach)
        starts = [np.zeros(alike.paths.num_prices)]
        for _ in range(_ROUNDS):
            most_arcs = int(self.left_s() / _S_PER_ARC)
            found = alike.paths.best_prices(alike.reach, starts, window=above + _WINDOW, most_arcs=most_arcs)
            if found is None:
                break
            self.shares = alike.spread(found.shares)
            tried = alike.widen(found.prices)
            better = self.paths.values(reach, tried)
            if better.total > values.total:
                values, self.prices = better, tried
            if values.total > above + EPSILON or better.total > min(found.cost, above) - _CLOSE:
                break
            starts.append(found.prices)
        return values

    def _collapsed(self, reach: Reach) -> Alike:
        return Alike(self.paths, collapse(self.kinds, reach))

    def filled_up(self, chosen: list[int], limits: Limits) -> tuple[PlacedStage, ...] | None:
        """Return stages on the chosen places, and on more of them where the pipeline is shorter than wanted."""
        while len(chosen) < self.problem.num_stages:
            longer = next((order for order in self._longer(chosen) if self._split(order, limits)), None)
            if longer is None:
                return None
            chosen = longer
        stages = self._split(chosen, limits)
        latency = self.problem.latency_limit_ns
        if stages is None or (latency is not None and score(self.problem, stages).latency_ns > latency):
            return None
        return stages

    def _longer(self, chosen: list[int]) -> Iterator[list[int]]:
        used = {device for place in chosen for device in self.problem.places[place].device_ids}
        spare: dict[tuple[str, int], int] = {}
        for place, kind in enumerate(self.kinds.of_place):
            if used.isdisjoint(self.problem.places[place].device_ids):
                home = self.problem.places[place].host
                near = any(self.problem.places[other].host == home for other in chosen)
                spare.setdefault((home if near else "", kind), place)
        roomiest = sorted(spare.values(), key=lambda place: -self.problem.places[place].room_bytes)
        for place in roomiest[:_SPARE_TRIES]:
            for at in reversed(range(len(chosen) + 1)):
                yield [*chosen[:at], place, *chosen[at:]]

    def _split(self, order: list[int], limits: Limits) -> tuple[PlacedStage, ...] | None:
        if len(order) > len(self.problem.pieces):
            return None
        return best_split(self.costs, order, kv_tokens=limits.kv_tokens, limit_ns=limits.bottleneck_ns)
