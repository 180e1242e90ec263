"""Pipelines as shortest paths whose places have prices: lower bounds on the number of stages, and where to search.

Let each stage go as far as its place reaches, and count stages. That each device is there only once makes the problem
hard; here a device may be used again for a price, and what the prices of all devices together come to is taken off.
For any prices that is a lower bound on the number of stages (Lagrange), so a bound above the number that is wanted
proves that no pipeline keeps the limits: with uneven pieces, partial memory and the links as they are. A subgradient
ascent finds good prices; the same values then tell a search which places to try first and which never.
"""

from dataclasses import dataclass

import numpy as np

from planner.reach import Floats, Ints, Kinds, Reach

EPSILON = 1e-6  # what rounding may come to: a bound counts as above a whole number only beyond it


@dataclass(frozen=True, slots=True)
class Values:
    """Least price of the stages that are still to come, by what stands last and the piece that comes next."""

    total: float  # of the whole pipeline, less what all devices together are worth: the bound
    after: Floats  # [state, piece]
    fixed: float  # what all devices together are worth


class PricedPaths:
    """The graph of a problem's kinds of places.

    A state is what stands last: devices of a host of some class, with the number of devices used there in a row
    (a stage on a host of which n devices are taken in a row can be followed there only by those left). State 0 is
    anywhere, with no place nearer than others.
    """

    def __init__(self, kinds: Kinds) -> None:
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
                entries.append((row, kind, first_state + (width - 1 if near else 0) if near or rack else 0))
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
        self.rack_entries = [np.flatnonzero(np.asarray(rack_of_entry) == rack) for rack in range(1, len(racks) + 1)]
        self.cap = np.asarray(self.caps, dtype=np.float64)
        self.members = self._members()

    def _members(self) -> list[tuple[Ints, float]]:
        """Rows that use the same devices: a group of devices uses as many of its host's devices as it is wide."""
        found = []
        for index, host in enumerate(self.kinds.hosts):
            rows = [row for row, (owner, _) in enumerate(self.rows) if owner == index]
            if any(self.kinds.kinds[self.rows[row][1]].width > 1 for row in rows):
                found.append((np.asarray(rows), float(host.devices * len(host.hosts))))
        return found

    @property
    def num_prices(self) -> int:
        """One for each kind on each class of hosts, and one for each class of hosts with groups."""
        return len(self.rows) + len(self.members)

    def limits(self) -> Floats:
        """Return how often each priced thing is there."""
        return np.concatenate([self.cap, [limit for _, limit in self.members]])

    def stage_prices(self, prices: Floats) -> Floats:
        """Return the price of a stage by row: one, and what its devices are worth."""
        stage = 1.0 + prices[: len(self.rows)]
        for (rows, _), price in zip(self.members, prices[len(self.rows) :], strict=True):
            widths = np.asarray([self.kinds.kinds[self.rows[row][1]].width for row in rows])
            stage[rows] += price * widths
        return stage

    def used(self, path: list[int]) -> Floats:
        """Return how often a path, given as rows, uses each priced thing."""
        counts = np.bincount(path, minlength=len(self.rows)).astype(np.float64)
        widths = np.asarray([self.kinds.kinds[kind].width for _, kind in self.rows], dtype=np.float64)
        return np.concatenate([counts, [float((counts * widths)[rows].sum()) for rows, _ in self.members]])

    def values(self, reach: Reach, prices: Floats) -> Values:
        """Return the least prices from every state and piece, by dynamic programming from the last piece."""
        stage = self.stage_prices(prices)
        count = reach.network.shape[1] - 1
        network, rack = reach.network[self.entry_kind], reach.rack[self.entry_kind]
        host = reach.host[self.inner_kind]
        entry_price, inner_price = stage[self.entry_row], stage[self.inner_row]
        after = np.full((self.num_states, count + 1), np.inf)
        after[:, count] = 0.0
        for piece in range(count - 1, 0, -1):
            arrived = entry_price + after[self.entry_state, network[:, piece]]
            after[:, piece] = arrived.min()
            if self.rack_entries:
                arrived = entry_price + after[self.entry_state, rack[:, piece]]
                best = np.asarray([np.inf, *(arrived[entries].min() for entries in self.rack_entries)])
                after[:, piece] = np.minimum(after[:, piece], best[self.rack_of_state])
            if len(self.inner_states):
                followed = inner_price + after[self.inner_state, host[:, piece]]
                nearest = np.minimum.reduceat(followed, self.inner_starts)
                after[self.inner_states, piece] = np.minimum(after[self.inner_states, piece], nearest)
        started = entry_price + after[self.entry_state, reach.from_start[self.entry_kind]]
        fixed = float((prices * self.limits()).sum())
        return Values(total=float(started.min()) - fixed, after=after, fixed=fixed)

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

    def path(self, reach: Reach, prices: Floats, values: Values) -> list[int]:
        """Return the rows of a cheapest path."""
        stage, after = self.stage_prices(prices), values.after
        count = after.shape[1] - 1
        ends = reach.from_start[self.entry_kind]
        best = int(np.argmin(stage[self.entry_row] + after[self.entry_state, ends]))
        rows, state, piece = [int(self.entry_row[best])], int(self.entry_state[best]), int(ends[best])
        while piece < count:
            options = []
            for arcs, row, kind, to, table in self._ways(reach, state):
                ends = table[kind[arcs], piece]
                found = stage[row[arcs]] + after[to[arcs], ends]
                at = int(np.argmin(found))
                options.append((float(found[at]), int(row[arcs][at]), int(to[arcs][at]), int(ends[at])))
            _, chosen, state, piece = min(options)
            rows.append(chosen)
        return rows

    def _ways(self, reach: Reach, state: int) -> list[tuple[Ints | slice, Ints, Ints, Ints, Ints]]:
        entry = (self.entry_row, self.entry_kind, self.entry_state)
        ways: list[tuple[Ints | slice, Ints, Ints, Ints, Ints]] = [(slice(None), *entry, reach.network)]
        if rack := int(self.rack_of_state[state]):
            ways.append((self.rack_entries[rack - 1], *entry, reach.rack))
        first, last = np.searchsorted(self.inner_from, [state, state + 1])
        if last > first:
            inner = (self.inner_row, self.inner_kind, self.inner_state)
            ways.append((slice(int(first), int(last)), *inner, reach.host))
        return ways

    def ascend(self, reach: Reach, prices: Floats, *, above: int, steps: int) -> tuple[Floats, Values]:
        """Return prices whose bound is above ``above`` stages, or the best of so many steps, with their values.

        Subgradient steps of Polyak's length, aiming half a stage above the number that is wanted.
        """
        limits = self.limits()
        best_prices, best = prices, self.values(reach, prices)
        values = best
        for _ in range(steps):
            if best.total > above + EPSILON:
                break
            slope = self.used(self.path(reach, prices, values)) - limits
            slope[(prices <= 0) & (slope < 0)] = 0.0
            length = float((slope * slope).sum())
            if length == 0 or not np.isfinite(values.total):
                break
            prices = np.maximum(0.0, prices + slope * ((above + 0.5 - values.total) / length))
            values = self.values(reach, prices)
            if values.total > best.total:
                best_prices, best = prices, values
        return best_prices, best
