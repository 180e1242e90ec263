"""The placement of one pipeline: the best there is by all aims in turn, or the best found with a bound.

1. What cannot be for plain reasons is refused with the numbers.
2. Bounds and search close in on the smallest bottleneck, then on the largest KV capacity (``placement_search``).
3. The flow model closes what gap is left, and settles the other aims on all places where it is small enough, else on a
   choice of places; then their bounds are those of the choice and not claimed (``placement_model``).
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.errors import NoFeasiblePlan, PlanTimeout
from planner.infeasible import why_impossible, why_no_way
from planner.placement import (
    Aim,
    PlacedStage,
    Placement,
    Proof,
    bottleneck_limit_ns,
    kv_limit_tokens,
    score,
)
from planner.placement_model import PlacementModel
from planner.placement_problem import PlacementProblem
from planner.placement_search import Limits, PlacementSearch
from planner.reach import bottleneck_candidates
from planner.segments import Segment, SegmentCosts
from planner.solver import Outcome

_STEPS_UP = (1.003, 1.01, 1.03, 1.1, 1.3, 2.0, 5.0)  # over the bound, where a first pipeline is looked for
_MODEL_SEGMENTS = 6_000  # that the flow model is given at most


class Budget:
    """The time that is left, by a clock that the caller lends."""

    def __init__(self, *, limit_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._end_s = clock() + limit_s
        self.limit_s = limit_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._end_s - self._clock())

    def is_spent(self) -> bool:
        return self.left_s <= 0


@dataclass(slots=True, kw_only=True)
class _Best:
    """The best value of an aim so far and the bound on it, as positions on a ladder of values, the best first."""

    stages: tuple[PlacedStage, ...] | None
    at: int  # of the best value found; the length of the ladder where there is none
    impossible: int  # all up to here are proven impossible


def place(problem: PlacementProblem, *, budget: Budget, start: Sequence[PlacedStage] = ()) -> Placement:
    """Return the best placement by all aims in turn.

    Args:
        start: Stages to begin with, as those of an earlier answer; they count only where they keep the rules.

    Raises:
        NoFeasiblePlan: Proven: nothing fits; the message has the numbers.
        PlanTimeout: Nothing was found within the budget, and nothing proven.
    """
    if refusal := why_impossible(problem):
        raise NoFeasiblePlan(refusal)
    return _Solver(problem, budget).solve(tuple(start))


class _Solver:
    def __init__(self, problem: PlacementProblem, budget: Budget) -> None:
        self.problem, self.budget = problem, budget
        self.search = PlacementSearch(problem, out_of_time=budget.is_spent)
        self.costs = self.search.costs
        self.proofs: list[Proof] = []

    def solve(self, start: tuple[PlacedStage, ...]) -> Placement:
        bottleneck = self._bottleneck(start)
        self.proofs.append(bottleneck[1])
        limit_ns = bottleneck_limit_ns(self.proofs[0].value)
        stages, capacity = self._capacity(bottleneck[0], limit_ns)
        self.proofs.append(capacity)
        stages = self._rest(stages, Limits(bottleneck_ns=limit_ns, kv_tokens=kv_limit_tokens(capacity.value)))
        return Placement(stages=stages, scores=score(self.problem, stages), proofs=tuple(self.proofs))

    # ---- bottleneck

    def _bottleneck(self, start: tuple[PlacedStage, ...]) -> tuple[tuple[PlacedStage, ...], Proof]:
        tokens = self.problem.min_kv_tokens
        ladder = [int(value) for value in bottleneck_candidates(self.search.kinds, self.costs)]

        def limits(value: int) -> Limits:
            return Limits(bottleneck_ns=value, kv_tokens=tokens)

        def reached(stages: Sequence[PlacedStage]) -> int:
            return bisect_left(ladder, score(self.problem, stages).bottleneck_ns)

        best = _Best(stages=start or None, at=reached(start) if start else len(ladder), impossible=-1)
        if not self.problem.fixed_order:
            self._close_in(ladder, best, limits, reached)
        if best.at > best.impossible + 1:
            self._close_by_model(ladder, best, limits)
        if best.impossible == len(ladder) - 1:
            raise NoFeasiblePlan(why_no_way(self.problem))
        if best.stages is None:
            raise PlanTimeout(f"nothing found in {self.budget.limit_s:g} s for {self.problem.num_stages} stages")
        proof = Proof(aim=Aim.BOTTLENECK, value=ladder[best.at], bound=ladder[min(best.impossible + 1, best.at)])
        return best.stages, proof

    def _close_in(
        self,
        ladder: Sequence[int],
        best: _Best,
        limits: Callable[[int], Limits],
        reached: Callable[[Sequence[PlacedStage]], int],
    ) -> None:
        """Raise the bound and better the value by bisection, as far as bounds and search can tell.

        Between what is impossible and the best found, the middle is asked. Where nothing is said, only a bound is
        asked for below it and only a pipeline above it.
        """
        self._raise_bound(ladder, best, limits)
        if best.stages is None:
            self._first_found(ladder, best, limits, reached)
        low, high = best.impossible, best.at  # high: nothing is known from here to best.at
        while best.impossible + 1 < high and not self.budget.is_spent():
            middle = (best.impossible + high) // 2
            look = self.search.look(limits(ladder[middle]))
            if look.impossible:
                best.impossible = middle
                self._raise_bound(ladder, best, limits, below=high)
            elif look.stages is not None:
                best.stages, best.at = look.stages, reached(look.stages)
                high = min(best.at, high)
            else:
                high = middle
        low = max(best.impossible, high)
        while low + 1 < best.at and not self.budget.is_spent():
            middle = (low + best.at) // 2
            look = self.search.look(limits(ladder[middle]), improve=False)
            if look.stages is not None:
                best.stages, best.at = look.stages, reached(look.stages)
            else:
                low = middle

    def _raise_bound(
        self, ladder: Sequence[int], best: _Best, limits: Callable[[int], Limits], *, below: int | None = None
    ) -> None:
        """Find how far the prices that are known prove impossible: for fixed prices one bisection tells."""
        low, high = best.impossible, len(ladder) if below is None else below
        while low + 1 < high:
            middle = (low + high) // 2
            if self.search.is_impossible(limits(ladder[middle]), improve=False):
                low = middle
            else:
                high = middle
        best.impossible = max(best.impossible, low)

    def _first_found(
        self,
        ladder: Sequence[int],
        best: _Best,
        limits: Callable[[int], Limits],
        reached: Callable[[Sequence[PlacedStage]], int],
    ) -> None:
        lowest = best.impossible + 1
        if lowest >= len(ladder):
            return
        steps = [bisect_left(ladder, int(ladder[lowest] * step)) for step in _STEPS_UP] + [len(ladder) - 1]
        for at in dict.fromkeys(min(step, len(ladder) - 1) for step in steps):
            look = self.search.look(limits(ladder[at]))
            if look.stages is not None:
                best.stages, best.at = look.stages, reached(look.stages)
                return
            if look.impossible:
                best.impossible = max(best.impossible, at)
            if self.budget.is_spent():
                return

    def _close_by_model(self, ladder: Sequence[int], best: _Best, limits: Callable[[int], Limits]) -> None:
        """Let the flow model find the smallest bottleneck below the best found, or prove that there is none."""
        below = min(best.at, len(ladder)) - 1
        segments = self._segments(limits(ladder[below]))
        if segments is None:
            return
        model = PlacementModel(self.problem, segments, bottleneck_ns=ladder[below])
        model.model.add(model.bottleneck >= ladder[best.impossible + 1])
        answer = model.minimize(Aim.BOTTLENECK, limit_s=self.budget.left_s)
        if answer.outcome is Outcome.INFEASIBLE:
            best.impossible = below
        elif answer.bound is not None:
            best.impossible = max(best.impossible, bisect_left(ladder, answer.bound) - 1)
        if answer.found:
            best.stages, best.at = model.stages, bisect_left(ladder, answer.value)

    def _segments(self, limits: Limits) -> dict[int, list[Segment]] | None:
        """Return all that may matter within limits, None where it is more than the model can take."""
        if self.problem.fixed_order:
            places = range(len(self.problem.places))
            found = {
                p: list(self.costs.of(p, bottleneck_ns=limits.bottleneck_ns, kv_tokens=limits.kv_tokens))
                for p in places
            }
        else:
            found = self.search.segments(limits)
        return found if sum(map(len, found.values())) <= _MODEL_SEGMENTS else None

    # ---- KV capacity

    def _capacity(self, stages: tuple[PlacedStage, ...], limit_ns: int) -> tuple[tuple[PlacedStage, ...], Proof]:
        most = max(
            self.costs.kv_tokens(place, piece, piece + 1) for place in self._widest() for piece in self._pieces()
        )
        ladder = range(most, self.problem.min_kv_tokens - 1, -1)

        def limits(value: int) -> Limits:
            return Limits(bottleneck_ns=limit_ns, kv_tokens=value)

        def reached(found: Sequence[PlacedStage]) -> int:
            return most - score(self.problem, found).kv_tokens

        best = _Best(stages=stages, at=reached(stages), impossible=-1)
        if not self.problem.fixed_order:
            self._close_in(ladder, best, limits, reached)
        if best.at > best.impossible + 1:
            self._capacity_by_model(ladder, best, limits)
        assert best.stages is not None
        bound = ladder[min(best.impossible + 1, best.at)]
        return best.stages, Proof(aim=Aim.KV_CAPACITY, value=ladder[best.at], bound=bound)

    def _widest(self) -> list[int]:
        """The roomiest place of each kind of held pieces: what a single piece can have at most."""
        by_held: dict[tuple[tuple[int, int], ...], int] = {}
        for place, kind in enumerate(self.search.kinds.of_place):
            held = self.search.kinds.kinds[kind].held
            other = by_held.setdefault(held, place)
            if self.problem.places[place].room_bytes > self.problem.places[other].room_bytes:
                by_held[held] = place
        return list(by_held.values())

    def _pieces(self) -> range:
        return range(len(self.problem.pieces))

    def _capacity_by_model(self, ladder: range, best: _Best, limits: Callable[[int], Limits]) -> None:
        segments = self._segments(limits(ladder[best.at - 1]))
        if segments is None:
            return
        model = PlacementModel(self.problem, segments, bottleneck_ns=limits(0).bottleneck_ns)
        answer = model.minimize(Aim.KV_CAPACITY, limit_s=self.budget.left_s)
        if answer.outcome is Outcome.INFEASIBLE:
            best.impossible = best.at - 1
        elif answer.bound is not None:
            best.impossible = max(best.impossible, ladder[0] + answer.bound - 1)
        if answer.found:
            best.stages, best.at = model.stages, ladder[0] - model.scores().kv_tokens

    # ---- the other aims

    def _rest(self, stages: tuple[PlacedStage, ...], limits: Limits) -> tuple[PlacedStage, ...]:
        """Settle cost of the change, fragmentation and bytes moved, in turn."""
        segments = self._segments(limits)
        whole = segments is not None
        if segments is None:
            segments = self._choice(stages, limits)
        model = PlacementModel(self.problem, segments, bottleneck_ns=limits.bottleneck_ns)
        model.stages = stages
        model.hint(stages)
        for aim in (Aim.CHANGE, Aim.FRAGMENTATION, Aim.MOVED):
            answer = model.minimize(aim, limit_s=self.budget.left_s)
            value = score(self.problem, model.stages).of(aim)
            bound = answer.bound if whole and answer.bound is not None else 0
            self.proofs.append(Proof(aim=aim, value=value, bound=max(0, min(bound, value))))
            model.keep(aim, value)
        return model.stages

    def _choice(self, stages: tuple[PlacedStage, ...], limits: Limits) -> dict[int, list[Segment]]:
        """Return segments of the places at hand: those of the pipeline found, and those that hold pieces already."""
        chosen = {stage.place for stage in stages}
        chosen |= {place for place, found in enumerate(self.problem.places) if found.held}
        return {
            place: list(self.costs.of(place, bottleneck_ns=limits.bottleneck_ns, kv_tokens=limits.kv_tokens))
            for place in sorted(chosen)
        }


def segment_count(costs: SegmentCosts, limits: Limits) -> int:
    """Return how many segments there are within limits."""
    places = range(len(costs.problem.places))
    return sum(
        1 for place in places for _ in costs.of(place, bottleneck_ns=limits.bottleneck_ns, kv_tokens=limits.kv_tokens)
    )
