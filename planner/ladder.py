"""Closing in on the best value of one aim: what is proven impossible from one side, what was found from the other."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from planner.budget import Budget
from planner.placement import PlacedStage
from planner.placement_search import Limits, PlacementSearch

_STEPS_UP = (1.003, 1.01, 1.03, 1.1, 1.3, 2.0, 5.0)  # over the bound, where a first pipeline is looked for
_NEAR_ENOUGH = 0.002  # share of the value to which known prices are asked before better ones are sought


@dataclass(slots=True, kw_only=True)
class Ladder:
    """The values that an aim may have, the best first, and how far they are known. Positions count from the best.

    Attributes:
        limits: What each stage has to keep for a value.
        reached: The position of what stages reach.
        stages: The best that were found; None: none yet.
        at: Their position; the length of the ladder where there are none.
        impossible: All up to here are proven impossible.
    """

    values: Sequence[int]
    limits: Callable[[int], Limits]
    reached: Callable[[Sequence[PlacedStage]], int]
    stages: tuple[PlacedStage, ...] | None = None
    at: int = field(init=False)
    impossible: int = -1

    def __post_init__(self) -> None:
        self.at = len(self.values)

    @property
    def is_open(self) -> bool:
        """Whether there are values of which nothing is known."""
        return self.at > self.impossible + 1

    @property
    def open_until(self) -> int:
        """The first position that is reached; the length of the ladder where none is."""
        return min(self.at, len(self.values))

    @property
    def value(self) -> int:
        """The best value that was found."""
        return self.values[self.at]

    @property
    def bound(self) -> int:
        """What no stages can better."""
        return self.values[min(self.impossible + 1, self.at)]

    def note(self, stages: tuple[PlacedStage, ...]) -> None:
        """Take stages that were found."""
        self.stages, self.at = stages, self.reached(stages)


class Climb:
    """Raises the bound and betters the value by bisection, as far as bounds and search can tell."""

    def __init__(self, ladder: Ladder, search: PlacementSearch, budget: Budget, *, has_known_prices: bool) -> None:
        self.ladder, self.search, self.budget, self.has_known_prices = ladder, search, budget, has_known_prices

    def close_in(self) -> None:
        """Close in from both sides until they meet, time is up, or neither tells more.

        1. Between what is impossible and the best found, the middle is asked for. Where nothing is said of it, the
           bound is sought below it.
        2. Then a better pipeline is sought above the bound.
        """
        ladder = self.ladder
        self._raise_bound(near_enough=_NEAR_ENOUGH if self.has_known_prices else 0.0)
        if ladder.stages is None:
            self._find_first()
        elif self.has_known_prices:
            self._ask_known()
        open_from = ladder.open_until
        while ladder.impossible + 1 < open_from and not self.budget.is_spent():  # 1
            middle = (ladder.impossible + open_from) // 2
            look = self.search.look(self._limits(middle))
            if look.impossible:
                ladder.impossible = middle
                self._raise_bound()
            else:
                open_from = middle
            if look.stages is not None:
                ladder.note(look.stages)
                open_from = min(open_from, ladder.at)
        low = open_from
        while low < ladder.at and not self.budget.is_spent():  # 2
            middle = (low + ladder.open_until) // 2
            look = self.search.look(self._limits(middle))
            if look.stages is not None:
                ladder.note(look.stages)
            else:
                low = middle + 1

    def _limits(self, position: int) -> Limits:
        return self.ladder.limits(self.ladder.values[position])

    def _ask_known(self) -> None:
        """Better what was found by the prices that are known alone, which is quick, until that tells little more."""
        ladder = self.ladder
        low = ladder.impossible + 1
        while low < ladder.at and not self.budget.is_spent():
            if abs(ladder.value - ladder.values[low]) <= _NEAR_ENOUGH * ladder.value:
                return
            middle = (low + ladder.at) // 2
            look = self.search.look(self._limits(middle), improve=False)
            if look.stages is not None:
                ladder.note(look.stages)
            else:
                low = middle + 1
                ladder.impossible = max(ladder.impossible, middle if look.impossible else -1)

    def _raise_bound(self, *, near_enough: float = 0.0) -> None:
        """Find how far the prices that are known prove impossible: for fixed prices one bisection tells."""
        ladder = self.ladder
        low, high = ladder.impossible, ladder.open_until
        while low + 1 < high and not self.budget.is_spent():
            lowest, highest = sorted((ladder.values[low + 1], ladder.values[min(high, len(ladder.values) - 1)]))
            if highest - lowest <= near_enough * highest:
                break
            middle = (low + high) // 2
            if self.search.is_impossible(self._limits(middle), improve=False):
                low = middle
            else:
                high = middle
        ladder.impossible = max(ladder.impossible, low)

    def _find_first(self) -> None:
        """Look for a first pipeline a little above the bound, then farther and farther above it."""
        ladder, values = self.ladder, self.ladder.values
        lowest = ladder.impossible + 1
        if lowest >= len(values):
            return
        steps = [bisect_left(values, int(values[lowest] * step)) for step in _STEPS_UP] + [len(values) - 1]
        rungs = list(dict.fromkeys(min(step, len(values) - 1) for step in steps))
        for improve, at in [(False, at) for at in rungs] + [(True, at) for at in rungs]:
            look = self.search.look(self._limits(at), improve=improve)
            if look.stages is not None:
                ladder.note(look.stages)
                return
            if look.impossible:
                ladder.impossible = max(ladder.impossible, at)
            if self.budget.is_spent():
                return
