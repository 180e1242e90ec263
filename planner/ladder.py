"""Closing in on the best value of one aim: what is proven impossible from one side, what was found from the other."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from planner.budget import Budget
from planner.near_search import look_near
from planner.placement import PlacedStage
from planner.placement_search import Limits, PlacementSearch

_STEPS_UP = (1.003, 1.01, 1.03, 1.1, 1.3, 2.0, 5.0)  # over the bound, where a first pipeline is looked for
_STEPS_DOWN = (1.01, 1.02, 1.04, 1.1)  # from what was found, where its bound is looked for
_WIDE = 1.05  # times the value that is open, from which a proof of all of it is not to be hoped for
_FAR = 2.0  # times the other, where a value between two is a better middle than a position
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

    @property
    def gap(self) -> float:
        """How far the best found may be from the best there is, as a share of the former; 1 where none was found."""
        return 1.0 if self.stages is None else abs(self.value - self.bound) / max(1, self.value)

    def note(self, stages: tuple[PlacedStage, ...]) -> None:
        """Take stages that were found."""
        self.stages, self.at = stages, self.reached(stages)


class Climb:
    """Raises the bound and betters the value by bisection, as far as bounds and search can tell."""

    def __init__(self, ladder: Ladder, search: PlacementSearch, budget: Budget, *, has_known_prices: bool) -> None:
        self.ladder, self.search, self.budget, self.has_known_prices = ladder, search, budget, has_known_prices
        self.near_enough = _NEAR_ENOUGH

    def close_in(self) -> None:
        """Close in from both sides until they meet, time is up, or neither tells more.

        1. By the prices that are known, which is quick.
        2. By better prices: between what is impossible and the best found, the middle is asked for. Where nothing is
           said of it, the bound is sought below it, and then a better pipeline above that.
        3. What is still open is asked of the search that tells most and takes longest.
        4. Then as 2 and 3 to the last value: until here, what is open between two values near each other was left.
        """
        self._raise_bound()  # 1
        if self.ladder.stages is None:
            self._find_first()
        self._ask_near()
        self._ask_known()
        self._bisect()  # 2
        self._settle()  # 3
        self.near_enough = 0.0
        self._bisect()  # 4
        self._settle()

    def _bisect(self) -> None:
        """Ask for the middle with better prices: of the better or the worse side of what got no answer, the larger."""
        ladder = self.ladder
        silent_from, silent_to = len(ladder.values), 0  # positions that got no answer; none yet
        while ladder.is_open and not self.budget.is_spent():
            lowest, highest = ladder.impossible + 1, ladder.open_until
            sides = (lowest, min(silent_from, highest)), (max(silent_to, lowest), highest)
            left = [side for side in sides if side[0] < side[1] and not self._is_near(*side)]
            if not left:
                return
            middle = self._middle(*max(left, key=lambda side: self._apart(*side)))
            look = self.search.look(self._limits(middle))
            if look.stages is not None:
                ladder.note(look.stages)
            elif look.impossible:
                ladder.impossible = max(ladder.impossible, middle)
                self._raise_bound()
            else:
                silent_from, silent_to = min(silent_from, middle), max(silent_to, middle + 1)

    def _settle(self) -> None:
        """Ask for whole paths until nothing is open, or one gets no answer.

        Just below the best found where that is near the bound, for a proof there closes all of it at once; else, and
        after one that was found, in the middle, for the best may be far.
        """
        ladder, has_moved = self.ladder, False
        while ladder.is_open and not self.budget.is_spent():
            below = ladder.open_until - 1
            is_far = self._apart(ladder.impossible + 1, below) > _WIDE
            position = self._middle(ladder.impossible + 1, below) if has_moved or is_far else below
            look = self.search.look_whole(self._limits(position))
            if look.stages is not None:
                ladder.note(look.stages)
            elif look.impossible:
                ladder.impossible = max(ladder.impossible, position)
            else:
                return
            has_moved = look.stages is not None

    def _limits(self, position: int) -> Limits:
        return self.ladder.limits(self.ladder.values[position])

    def _value(self, position: int) -> int:
        return self.ladder.values[min(position, len(self.ladder.values) - 1)]

    def _middle(self, low: int, high: int) -> int:
        """Return the position from ``low`` up to below ``high`` in the middle; of values far apart, by their ratio."""
        first, last = self._value(low), self._value(high)
        if max(first, last) <= _FAR * min(first, last):
            return (low + high) // 2
        mean = math.sqrt(max(1, first) * max(1, last))
        rising = first <= last

        def is_beyond(position: int) -> bool:
            return (self._value(position) >= mean) == rising

        return max(low, min(high - 1, bisect_left(range(low, high), True, key=is_beyond) + low))

    def _apart(self, position: int, other: int) -> float:
        """Return how many times the one value the other one is."""
        values = sorted((self._value(position), self._value(other)))
        return values[1] / max(1, values[0])

    def _is_near(self, position: int, other: int) -> bool:
        return self._apart(position, other) < 1 + self.near_enough

    def _ask_near(self) -> None:
        """Better what was found by exchanging some of its places."""
        ladder = self.ladder
        low = ladder.impossible + 1
        while low < ladder.at and ladder.stages and not self.budget.is_spent() and not self._is_near(ladder.at, low):
            middle = self._middle(low, ladder.at)
            stages = look_near(self.search, self._limits(middle), ladder.stages)
            if stages is not None:
                ladder.note(stages)
            else:
                low = middle + 1

    def _ask_known(self) -> None:
        """Better what was found by the prices that are known alone, which is quick, until that tells little more."""
        ladder = self.ladder
        low = ladder.impossible + 1
        while low < ladder.at and not self.budget.is_spent() and not self._is_near(ladder.at, low):
            middle = self._middle(low, ladder.at)
            look = self.search.look(self._limits(middle), improve=False)
            if look.stages is not None:
                ladder.note(look.stages)
            else:
                low = middle + 1
                ladder.impossible = max(ladder.impossible, middle if look.impossible else -1)

    def _raise_bound(self) -> None:
        """Find how far the prices that are known prove impossible: for fixed prices one bisection tells.

        The bound is mostly near what was found, so the search begins there, in longer and longer steps.
        """
        ladder = self.ladder
        low, high = ladder.impossible, ladder.open_until
        nearby = iter(_STEPS_DOWN if ladder.stages is not None else ())
        while low + 1 < high and not self.budget.is_spent() and not self._is_near(low + 1, high):
            step = next(nearby, None)
            middle = self._middle(low + 1, high) if step is None else self._away(low + 1, high, step)
            if self.search.is_impossible(self._limits(middle), improve=False):
                low, nearby = middle, iter(())
            else:
                high = middle
        ladder.impossible = max(ladder.impossible, low)

    def _away(self, low: int, high: int, times: float) -> int:
        """Return the last position from ``low`` up to below ``high`` with a value so many times that of ``high``."""

        def is_beyond(position: int) -> bool:
            return self._apart(position, high) < times

        return max(low, min(high, bisect_left(range(low, high), True, key=is_beyond) + low) - 1)

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
