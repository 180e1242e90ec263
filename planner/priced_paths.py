"""Pipelines as shortest paths whose places have prices: lower bounds on the number of stages, and where to search.

Let each stage go as far as its place reaches, and count stages. That each device is there only once makes the problem
hard; here a device may be used again for a price, and what the prices of all devices together come to is taken off.
For any prices that is a lower bound on the number of stages (Lagrange), so a bound above the number that is wanted
proves that no pipeline keeps the limits: with uneven pieces, partial memory and the links as they are. A linear
program finds the best prices; the same values then tell a search which places to try first and which never.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.reach import Floats, Ints, KindTable, Reach
from planner.solver import FlowArcs, Outcome, cheapest_flow, whole_flow

Shares = dict[tuple[int, int], float]  # of a cheapest flow, by first piece and row

_S_PER_WHOLE_ARC = 5e-5  # what the search for a whole path takes at least on any machine of today
EPSILON = 1e-6  # what rounding may come to: a bound counts as above a whole number only beyond it


@dataclass(frozen=True, slots=True)
class Values:
    """Least price of the stages that are still to come, by what stands last and the piece that comes next."""

    total: float  # of the whole pipeline, less what all devices together are worth: the bound
    after: Floats  # [state, piece]
    fixed: float  # what all devices together are worth


@dataclass(frozen=True, slots=True, kw_only=True)
class BestPrices:
    """The prices of a cheapest flow, the shares of each row in it by piece, and what it costs."""

    prices: Floats
    shares: Shares
    cost: float


class PricedPaths:
    """The graph of a problem's kinds of places.

    A state is what stands last: devices of a host of some class, with the number of devices used there in a row
    (a stage on a host of which n devices are taken in a row can be followed there only by those left). State 0 is
    anywhere, with no place nearer than others.
    """

    def __init__(self, kinds: KindTable) -> None:
        self.kinds = kinds
        self.rows: list[tuple[int, int]] = []  # host class and kind: one price each
        self.caps: list[int] = []
        entries: list[tuple[int, int, int]] = []  # row, kind, state after it
        inner: list[tuple[int, int, int, int]] = []  # state before, row, kind, state after
        racks = sorted({found.rack for found in kinds.hosts if found.rack})
        rack_of_state = [0]
        rack_of_entry = []
        for index, found in enumerate(kinds.hosts):
            rack = 1 + racks.index(found.rack) if found.rack else 0
            near = any(kinds.kinds[kind].host_ns is not None for kind, _ in found.kinds) and found.devices > 1
            first_state = len(rack_of_state)
            states = found.devices if near else 1
            if near or rack:
                rack_of_state += [rack] * states
            for kind, _ in found.kinds:
                row, width = len(self.rows), kinds.kinds[kind].width
                self.rows.append((index, kind))
                self.caps.append(found.count(kind))
                inside = min(width, states) - 1 if near else 0
                entries.append((row, kind, first_state + inside if near or rack else 0))
                rack_of_entry.append(rack)
                if near:
                    inner += [
                        (first_state + used - 1, row, kind, first_state + used + width - 1)
                        for used in range(1, found.devices - width + 1)
                    ]
        inner.sort()
        self.num_states = len(rack_of_state)
        self.rack_of_state = np.asarray(rack_of_state)
        self.entry_row, self.entry_kind, self.entry_state = np.asarray(entries, dtype=np.int64).T
        columns = np.asarray(inner, dtype=np.int64).reshape(-1, 4).T
        self.inner_from, self.inner_row, self.inner_kind, self.inner_state = columns
        self.inner_states, self.inner_starts = np.unique(self.inner_from, return_index=True)
        self.deepest = max((found.devices for found in kinds.hosts), default=1)
        self.rack_of_entry = np.asarray(rack_of_entry)
        self.rack_entries = [np.flatnonzero(np.asarray(rack_of_entry) == rack) for rack in range(1, len(racks) + 1)]
        self.cap = np.asarray(self.caps, dtype=np.float64)
        self.members = self._members()

    def _members(self) -> dict[int, tuple[Ints, float]]:
        """By host class, rows that use the same devices: a group uses as many of its host's devices as it is wide."""
        found = {}
        for index, host in enumerate(self.kinds.hosts):
            rows = [row for row, (owner, _) in enumerate(self.rows) if owner == index]
            if any(self.kinds.kinds[self.rows[row][1]].width > 1 for row in rows):
                found[index] = (np.asarray(rows), float(host.devices * len(host.hosts)))
        return found

    @property
    def num_prices(self) -> int:
        """One for each kind on each class of hosts, and one for each class of hosts with groups."""
        return len(self.rows) + len(self.members)

    def limits(self) -> Floats:
        """Return how often each priced thing is there."""
        return np.concatenate([self.cap, [limit for _, limit in self.members.values()]])

    def stage_prices(self, prices: Floats) -> Floats:
        """Return the price of a stage by row: one, and what its devices are worth."""
        stage = 1.0 + prices[: len(self.rows)]
        for (rows, _), price in zip(self.members.values(), prices[len(self.rows) :], strict=True):
            widths = np.asarray([self.kinds.kinds[self.rows[row][1]].width for row in rows])
            stage[rows] += price * widths
        return stage

    def values(self, reach: Reach, prices: Floats) -> Values:
        """Return the least prices from every state and piece, by dynamic programming from the last piece."""
        stage = self.stage_prices(prices)
        count, states = reach.network.shape[1] - 1, self.num_states
        entry_price = stage[self.entry_row]
        able = reach.able
        # by piece, as all below; a relay that cannot have held any piece before is none
        network_price = _by_piece(np.where(able[self.entry_kind], entry_price[:, None], np.inf))
        inner_price = _by_piece(np.where(able[self.inner_kind], stage[self.inner_row][:, None], np.inf))
        # where in ``known`` a stage leads to
        network = _by_piece(reach.network[self.entry_kind]) * states + self.entry_state
        rack = _by_piece(reach.rack[self.entry_kind]) * states + self.entry_state
        host = _by_piece(reach.host[self.inner_kind]) * states + self.inner_state
        relays = self._relays(reach)
        after = np.full((count + 1, states), np.inf)
        after[count] = 0.0
        known = after.reshape(-1)  # the same memory
        for piece in range(count - 1, 0, -1):
            here = after[piece]
            if len(self.inner_states):
                for _ in range(self.deepest if relays[piece] else 1):  # what a relay leads to has to be known before it
                    followed = inner_price[piece] + known[host[piece]]
                    here[self.inner_states] = np.minimum.reduceat(followed, self.inner_starts)
            best = (network_price[piece] + known[network[piece]]).min()
            if self.rack_entries:
                arrived = network_price[piece] + known[rack[piece]]
                racks = np.asarray([np.inf, *(arrived[entries].min() for entries in self.rack_entries)])
                best = min(best, (entry_price + racks[self.rack_of_entry]).min())
                np.minimum(here, racks[self.rack_of_state], out=here)
            np.minimum(here, best, out=here)
        started = entry_price + known[reach.from_start[self.entry_kind] * states + self.entry_state]
        fixed = float((prices * self.limits()).sum())
        return Values(total=float(started.min()) - fixed, after=after.T, fixed=fixed)

    def _relays(self, reach: Reach) -> list[bool]:
        """Say for each piece whether a place may serve as a relay there.

        A stage before it may take less than it reaches, to leave a piece to a place that can hold that one but not
        the next; taken as far as it reaches it leaves nothing, and what counts is that the hop from there is shorter.
        """
        host = reach.host
        stuck = (host[:, 1:] == np.arange(1, host.shape[1])) & (host[:, :-1] == host[:, 1:])
        return [False, *stuck.any(axis=0).tolist()]

    def arrivals(self, reach: Reach, prices: Floats) -> Floats:
        """Return the least price of stages that cover all before each piece, with the nearest hop into every stage."""
        price = self.stage_prices(prices)[self.entry_row]
        nearest = np.maximum(np.maximum(reach.network, reach.rack), reach.host)[self.entry_kind]
        count = nearest.shape[1] - 1
        pushed = np.full(count + 1, np.inf)
        np.minimum.at(pushed, reach.from_start[self.entry_kind], price)
        for piece in range(1, count):
            pushed[piece] = pushed[piece:].min()  # whoever gets further has covered this as well
            ends = nearest[:, piece]
            np.minimum.at(pushed, ends[ends > piece], pushed[piece] + price[ends > piece])
        pushed[0] = 0.0
        return pushed

    def best_prices(
        self, reach: Reach, starts: Sequence[Floats], *, window: float, most_arcs: int
    ) -> BestPrices | None:
        """Return the prices whose bound is highest, None where no flow gets to the last piece or it has too many arcs.

        They are the shadow prices of a flow from the first piece to the last, among the stages that can be part of a
        pipeline of at most ``window`` stages by any of the prices given. Stages left out may make the bound of these
        prices lower than the flow costs: asked again with these prices among those given, they play their part.
        """
        arcs = self._arcs(reach, starts, window=window)
        found = cheapest_flow(arcs, limits=self.limits()) if len(arcs.tails) <= most_arcs else None
        if found is None:
            return None
        return BestPrices(prices=found.prices, shares=self._shares(arcs, found.amounts, reach), cost=found.cost)

    def whole_path(self, reach: Reach, prices: Floats, *, most: int, limit_s: float) -> tuple[Outcome, Shares]:
        """Look for a pipeline of at most ``most`` stages that uses nothing more often than it is there."""
        arcs = self._arcs(reach, [prices], window=most + EPSILON)
        if len(arcs.tails) * _S_PER_WHOLE_ARC > limit_s:
            return Outcome.UNKNOWN, {}
        outcome, amounts = whole_flow(arcs, limits=self.limits(), most=most, limit_s=limit_s)
        return outcome, self._shares(arcs, amounts, reach) if len(amounts) else {}

    def _shares(self, arcs: FlowArcs, amounts: Floats, reach: Reach) -> Shares:
        width = reach.network.shape[1]
        passed = np.flatnonzero((amounts > EPSILON) & (arcs.uses >= 0))
        return {(int(arcs.tails[a]) % width, int(arcs.uses[a])): float(amounts[a]) for a in passed}

    def _arcs(self, reach: Reach, starts: Sequence[Floats], *, window: float) -> FlowArcs:
        """Return the stages as arcs between nodes: (state, piece) to the piece that comes next; state 0 is anywhere.

        Nodes of racks come behind the states. What has arrived may forget where it is, for nothing. Relays, which
        advance by no piece, are among the stages.
        """
        count = reach.network.shape[1] - 1
        width = count + 1
        known = [
            (self.arrivals(reach, prices), self.stage_prices(prices), self.values(reach, prices)) for prices in starts
        ]
        tails, heads, rows = [], [], []

        kind_of_row = np.asarray([kind for _, kind in self.rows])

        def add(tail_state: Ints, row: Ints, state: Ints, ends: Ints, first: int) -> None:
            keep = np.zeros(len(row), dtype=bool)
            for arrivals, stage, values in known:
                keep |= arrivals[first] + stage[row] + values.after[state, ends] <= window + values.fixed
            relays = (state > 0) & (tail_state != state) & reach.able[kind_of_row[row], first] & (first > 0)
            keep &= (ends > first) | relays
            tails.append(tail_state[keep] * width + first)
            heads.append(np.where(ends[keep] == count, count, state[keep] * width + ends[keep]))
            rows.append(row[keep])

        anywhere = np.zeros_like(self.entry_row)
        add(anywhere, self.entry_row, self.entry_state, reach.from_start[self.entry_kind], 0)
        for piece in range(1, count):
            add(anywhere, self.entry_row, self.entry_state, reach.network[self.entry_kind, piece], piece)
            if self.rack_entries:
                rack = np.where(self.rack_of_entry > 0, self.num_states + self.rack_of_entry - 1, 0)
                add(rack, self.entry_row, self.entry_state, reach.rack[self.entry_kind, piece], piece)
            add(self.inner_from, self.inner_row, self.inner_state, reach.host[self.inner_kind, piece], piece)
        tail, head, row = np.concatenate(tails), np.concatenate(heads), np.concatenate(rows)
        nodes = np.unique(head)
        states, pieces = nodes // width, nodes % width
        forget = nodes[states > 0]
        near = states > 0
        near &= self.rack_of_state[np.minimum(states, self.num_states - 1)] > 0
        racked = nodes[near]
        rack_nodes = (self.num_states + self.rack_of_state[states[near]] - 1) * width + pieces[near]
        free = np.full(len(forget) + len(racked), -1)
        return FlowArcs(
            tails=np.concatenate([tail, forget, racked]),
            heads=np.concatenate([head, forget % width, rack_nodes]),
            uses=np.concatenate([row, free]),
            consumption=[self._consumption(row) for row in range(len(self.rows))],
            source=0,
            sink=count,
        )

    def _consumption(self, row: int) -> list[tuple[int, float]]:
        """Return what a stage of a row takes of each priced thing."""
        found = [(row, 1.0)]
        for index, (rows, _) in enumerate(self.members.values()):
            if row in rows:
                found.append((len(self.rows) + index, float(self.kinds.kinds[self.rows[row][1]].width)))
        return found


def _by_piece(values: NDArray[Any]) -> NDArray[Any]:
    """Return what has a column for each piece with a row for each, one after the other in memory."""
    return np.ascontiguousarray(values.T)
