"""What reaches equally far, taken together, for the questions that take long to answer."""

import numpy as np

from planner.priced_paths import PricedPaths, Shares
from planner.reach import Collapse, Floats


class Alike:
    """The paths of a problem with what reaches equally far taken together, and the way between the two."""

    def __init__(self, whole: PricedPaths, found: Collapse) -> None:
        self.whole, self.reach = whole, found.reach
        self.paths = PricedPaths(found.table)
        row_of = {pair: row for row, pair in enumerate(self.paths.rows)}
        pairs = [(found.of_class[owner], found.of_kind[kind]) for owner, kind in whole.rows]
        groups = {owner: len(row_of) + at for at, owner in enumerate(self.paths.members)}
        # the number of the price here for each price of the whole; -1: of no use within the limits
        self.at = [row_of.get(pair, -1) for pair in pairs] + [
            groups.get(found.of_class[owner], -1) for owner in whole.members
        ]

    def widen(self, prices: Floats) -> Floats:
        """Return prices of the whole that are those of here."""
        return np.asarray([prices[at] if at >= 0 else 0.0 for at in self.at])

    def narrow(self, prices: Floats) -> Floats:
        """Return prices of here: the lowest of those that were taken together."""
        found = np.full(self.paths.num_prices, np.inf)
        for at, price in zip(self.at, prices, strict=True):
            if at >= 0:
                found[at] = min(found[at], price)
        return found

    def spread(self, shares: Shares) -> Shares:
        """Return shares of here as shares of the whole: each of what was taken together has them all."""
        alike: dict[int, list[int]] = {}
        for row, at in enumerate(self.at[: len(self.whole.rows)]):
            alike.setdefault(at, []).append(row)
        return {(piece, row): share for (piece, at), share in shares.items() for row in alike[at]}
