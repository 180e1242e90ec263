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
from planner.segments import Segment
from planner.solver import Outcome
from planner.start import usable_start

_STEPS_UP = (1.003, 1.01, 1.03, 1.1, 1.3, 2.0, 5.0)  # over the bound, where a first pipeline is looked for
_BOTTLENECK_SHARE = 0.5  # of the time that is left, for closing in on the bottleneck
_CAPACITY_SHARE = 0.8
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

    def part(self, share: float) -> "Budget":
        """Return a share of what is left, on the same clock."""
        part = Budget(limit_s=self.left_s * share, clock=self._clock)
        part.limit_s = self.limit_s
        return part


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
    return _Solver(problem, budget).solve(usable_start(problem, start))


class _Solver:
    def __init__(self, problem: PlacementProblem, budget: Budget) -> None:
        self.problem, self.budget = problem, budget
        self.search = PlacementSearch(problem, left_s=lambda: budget.left_s)
        self.costs = self.search.costs
        self.proofs: list[Proof] = []

    def solve(self, start: tuple[PlacedStage, ...]) -> Placement:
        whole = self.budget
        self.budget = whole.part(_BOTTLENECK_SHARE)
        stages, bottleneck = self._bottleneck(start)
        limit_ns = bottleneck_limit_ns(bottleneck.value)
        self.budget = whole.part(_CAPACITY_SHARE)
        stages, capacity = self._capacity(stages, limit_ns)
        self.budget = whole
        self.proofs += [bottleneck, capacity]
        tokens = max(self.problem.min_kv_tokens, kv_limit_tokens(capacity.value))
        stages = self._rest(stages, Limits(bottleneck_ns=limit_ns, kv_tokens=tokens))
        return Placement(stages=stages, scores=score(self.problem, stages), proofs=tuple(self.proofs))

    # ---- bottleneck

    def _bottleneck(self, start: tuple[PlacedStage, ...]) -> tuple[tuple[PlacedStage, ...], Proof]:
        tokens = self.problem.min_kv_tokens
        ladder: Sequence[int] = bottleneck_candidates(self.search.kinds, self.costs).tolist()

        def limits(value: int) -> Limits:
            return Limits(bottleneck_ns=value, kv_tokens=tokens)

        def reached(stages: Sequence[PlacedStage]) -> int:
            return bisect_left(ladder, score(self.problem, stages).bottleneck_ns)

        best = _Best(stages=start or None, at=reached(start) if start else len(ladder), impossible=-1)
        if not self.problem.fixed_order:
            self._close_in(ladder, best, limits, reached)
        if best.at > best.impossible + 1 and not self.budget.is_spent():
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

        1. Between what is impossible and the best found, the middle is asked for. Where nothing is said of it, the
           bound is sought below it.
        2. Then a better pipeline is sought above the bound.
        """
        self._raise_bound(ladder, best, limits)
        if best.stages is None:
            self._first_found(ladder, best, limits, reached)
        open_from = min(best.at, len(ladder))
        while best.impossible + 1 < open_from and not self.budget.is_spent():  # 1
            middle = (best.impossible + open_from) // 2
            look = self.search.look(limits(ladder[middle]))
            if look.impossible:
                best.impossible = middle
                self._raise_bound(ladder, best, limits)
            else:
                open_from = middle
            if look.stages is not None:
                best.stages, best.at = look.stages, reached(look.stages)
                open_from = min(open_from, best.at)
        low = open_from
        while low < best.at and not self.budget.is_spent():  # 2
            middle = (low + min(best.at, len(ladder))) // 2
            look = self.search.look(limits(ladder[middle]))
            if look.stages is not None:
                best.stages, best.at = look.stages, reached(look.stages)
            else:
                low = middle + 1

    def _raise_bound(self, ladder: Sequence[int], best: _Best, limits: Callable[[int], Limits]) -> None:
        """Find how far the prices that are known prove impossible: for fixed prices one bisection tells."""
        low, high = best.impossible, min(best.at, len(ladder))
        while low + 1 < high and not self.budget.is_spent():
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
        rungs = list(dict.fromkeys(min(step, len(ladder) - 1) for step in steps))
        for improve, at in [(False, at) for at in rungs] + [(True, at) for at in rungs]:
            look = self.search.look(limits(ladder[at]), improve=improve)
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
        if best.at > best.impossible + 1 and not self.budget.is_spent():
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
        if self.budget.is_spent():
            return stages
        segments = self._segments(limits)
        whole = segments is not None
        if segments is None:
            segments = self._choice(stages, limits)
        model = PlacementModel(self.problem, segments, bottleneck_ns=limits.bottleneck_ns)
        model.stages = stages
        model.hint(stages)
        floors = {Aim.CHANGE: self.costs.least_change_ns(), Aim.MOVED: self.costs.least_moved_bytes()}
        for aim in (Aim.CHANGE, Aim.FRAGMENTATION, Aim.MOVED):
            value, bound = score(self.problem, model.stages).of(aim), floors.get(aim, 0)
            if value > bound:
                answer = model.minimize(aim, limit_s=self.budget.left_s / 2)
                value = score(self.problem, model.stages).of(aim)
                bound = max(bound, answer.bound or 0) if whole else bound
            if not self._same_for_all(aim):
                model.keep(aim, value)
            self.proofs.append(Proof(aim=aim, value=value, bound=min(bound, value)))
        return model.stages

    def _same_for_all(self, aim: Aim) -> bool:
        """Say whether all placements are alike by an aim: where nothing holds anything yet, all bytes move."""
        places = self.problem.places
        empty = not any(place.held for place in places)
        same_rate = len({place.arrival_bytes_per_s for place in places}) == 1
        return empty and (aim is Aim.MOVED or (aim is Aim.CHANGE and same_rate))

    def _choice(self, stages: tuple[PlacedStage, ...], limits: Limits) -> dict[int, list[Segment]]:
        """Return segments of the places at hand: those of the pipeline found, and those that hold pieces already."""
        chosen = {stage.place for stage in stages}
        chosen |= {place for place, found in enumerate(self.problem.places) if found.held}
        return {
            place: list(self.costs.of(place, bottleneck_ns=limits.bottleneck_ns, kv_tokens=limits.kv_tokens))
            for place in sorted(chosen)
        }
