"""The placement of one pipeline: the best there is by all aims in turn, or the best found with a bound.

1. What cannot be for plain reasons is refused with the numbers.
2. Bounds and search close in on the smallest bottleneck, then on the largest KV capacity (``placement_search``).
3. The flow model closes what gap is left, and settles the other aims on all places where it is small enough, else on a
   choice of places; then their bounds are those of the choice and not claimed (``placement_model``).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from planner.budget import Budget
from planner.errors import NoFeasiblePlan, PlanTimeout
from planner.infeasible import why_impossible, why_no_way
from planner.known_prices import KnownPrices, named, prices_from
from planner.ladder import Climb, Ladder
from planner.placement import (
    Aim,
    PlacedStage,
    Placement,
    Proof,
    Scores,
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

_BOTTLENECK_SHARE = 0.5  # of the time that is left, for closing in on the bottleneck
_KNOWN_SHARE = 0.98  # the same where an earlier answer is known
_WIDE_GAP = 0.01  # of the bottleneck, which is worth as much time again
_LONG_S = 2.0  # with that much time, any gap is
_CAPACITY_SHARE = 0.8
_MODEL_SEGMENTS = 6_000  # that the flow model is given at most
_S_PER_RUN = 4e-6  # what looking at a segment takes on any machine of today, and building its part of the model
_S_PER_SEGMENT = 5e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What an answer leaves for a question that is much the same: the prices for each of the first two aims."""

    bottleneck: KnownPrices | None = None
    capacity: KnownPrices | None = None


def place(problem: PlacementProblem, *, budget: Budget, start: Sequence[PlacedStage] = ()) -> Placement:
    """Return the best placement by all aims in turn.

    Args:
        start: Stages to begin with, as those of an earlier answer; they count only where they keep the rules.

    Raises:
        NoFeasiblePlan: Proven: nothing fits; the message has the numbers.
        PlanTimeout: Nothing was found within the budget, and nothing proven.
    """
    return place_knowing(problem, budget=budget, start=start, known=Known())[0]


def place_knowing(
    problem: PlacementProblem, *, budget: Budget, start: Sequence[PlacedStage], known: Known
) -> tuple[Placement, Known]:
    """Return as ``place`` does, beginning with what is known, and what is known after it."""
    if refusal := why_impossible(problem):
        raise NoFeasiblePlan(refusal)
    solver = _Solver(problem, budget, known)
    return solver.solve(usable_start(problem, start, solver.costs)), solver.known


class _Solver:
    def __init__(self, problem: PlacementProblem, budget: Budget, known: Known) -> None:
        self.problem, self.budget, self.known = problem, budget, known
        self.search = PlacementSearch(problem, left_s=lambda: self.budget.left_s)
        self.costs = self.search.costs
        self.proofs: list[Proof] = []
        self.pool: list[tuple[Scores, tuple[PlacedStage, ...]]] = []  # all that was found

    def _use(self, known: KnownPrices | None) -> None:
        if known is not None:
            self.search.prices = prices_from(known, kinds=self.search.kinds, paths=self.search.paths)

    def _named(self) -> KnownPrices:
        return named(self.search.prices, kinds=self.search.kinds, paths=self.search.paths)

    def _remember(self, stages: tuple[PlacedStage, ...]) -> Scores:
        scores = score(self.problem, stages)
        self.pool.append((scores, stages))
        return scores

    def _within(self, limits: Limits) -> list[tuple[Scores, tuple[PlacedStage, ...]]]:
        return [
            (scores, stages)
            for scores, stages in self.pool
            if scores.bottleneck_ns <= limits.bottleneck_ns and scores.kv_tokens >= limits.kv_tokens
        ]

    def solve(self, start: tuple[PlacedStage, ...]) -> Placement:
        whole = self.budget
        self.budget = whole.part(_BOTTLENECK_SHARE if self.known.bottleneck is None else _KNOWN_SHARE)
        self._use(self.known.bottleneck)
        stages, bottleneck = self._bottleneck(start, whole)
        of_bottleneck = self._named()
        limit_ns = bottleneck_limit_ns(bottleneck.value)
        self.budget = whole.part(_CAPACITY_SHARE)
        self._use(self.known.capacity)
        self._remember(stages)
        within = self._within(Limits(bottleneck_ns=limit_ns, kv_tokens=self.problem.min_kv_tokens))
        stages, capacity = self._capacity(max(within, key=lambda found: found[0].kv_tokens)[1], limit_ns)
        self._remember(stages)
        self.budget = whole
        self.known = Known(bottleneck=of_bottleneck, capacity=self._named())
        self.proofs += [bottleneck, capacity]
        tokens = max(self.problem.min_kv_tokens, kv_limit_tokens(capacity.value))
        limits = Limits(bottleneck_ns=limit_ns, kv_tokens=tokens)
        least = min(self._within(limits), key=lambda f: (f[0].change_ns, f[0].fragmentation, f[0].moved_bytes))
        stages = self._rest(least[1], limits)
        return Placement(stages=stages, scores=score(self.problem, stages), proofs=tuple(self.proofs))

    # ---- bottleneck

    def _bottleneck(self, start: tuple[PlacedStage, ...], whole: Budget) -> tuple[tuple[PlacedStage, ...], Proof]:
        """Return stages of the smallest bottleneck; where it is far from its bound, in a further share of ``whole``."""
        tokens = self.problem.min_kv_tokens
        ladder: Sequence[int] = bottleneck_candidates(self.search.kinds, self.costs).tolist()

        def limits(value: int) -> Limits:
            return Limits(bottleneck_ns=value, kv_tokens=tokens)

        def reached(stages: Sequence[PlacedStage]) -> int:
            return bisect_left(ladder, self._remember(tuple(stages)).bottleneck_ns)

        best = Ladder(values=ladder, limits=limits, reached=reached)
        if start:
            best.note(start)
        self._close_in(best)
        if best.gap > _WIDE_GAP or (best.is_open and whole.left_s > _LONG_S):
            self.budget = whole.part(_BOTTLENECK_SHARE)
            self._close_in(best)
        if best.is_open and not self.budget.is_spent():
            self._close_by_model(best)
        if best.impossible == len(ladder) - 1:
            raise NoFeasiblePlan(why_no_way(self.problem))
        if best.stages is None:
            raise PlanTimeout(f"nothing found in {self.budget.limit_s:.2g} s for {self.problem.num_stages} stages")
        return best.stages, Proof(aim=Aim.BOTTLENECK, value=best.value, bound=best.bound)

    def _close_in(self, ladder: Ladder) -> None:
        if not self.problem.fixed_order:
            Climb(ladder, self.search, self.budget, has_known_prices=self.known.bottleneck is not None).close_in()

    def _close_by_model(self, best: Ladder) -> None:
        """Let the flow model find the smallest bottleneck below the best found, or prove that there is none."""
        below = best.open_until - 1
        segments = self._segments(best.limits(best.values[below]))
        if segments is None:
            return
        model = PlacementModel(self.problem, segments, bottleneck_ns=best.values[below])
        model.model.add(model.bottleneck >= best.values[best.impossible + 1])
        answer = model.minimize(Aim.BOTTLENECK, limit_s=self.budget.left_s)
        if answer.outcome is Outcome.INFEASIBLE:
            best.impossible = below
        elif answer.bound is not None:
            best.impossible = max(best.impossible, bisect_left(best.values, answer.bound) - 1)
        if answer.found:
            best.stages, best.at = model.stages, bisect_left(best.values, answer.value)

    def _segments(self, limits: Limits) -> dict[int, list[Segment]] | None:
        """Return all that may matter within limits, None where it is more than the model can take."""
        if self.problem.fixed_order:
            places = range(len(self.problem.places))
            found = {
                p: list(self.costs.of(p, bottleneck_ns=limits.bottleneck_ns, kv_tokens=limits.kv_tokens))
                for p in places
            }
        else:
            if self.search.num_runs(limits, range(len(self.problem.places))) * _S_PER_RUN > self.budget.left_s:
                return None
            found = self.search.segments(limits)
        count = sum(map(len, found.values()))
        return found if count <= _MODEL_SEGMENTS and count * _S_PER_SEGMENT <= self.budget.left_s else None

    # ---- KV capacity

    def _capacity(self, stages: tuple[PlacedStage, ...], limit_ns: int) -> tuple[tuple[PlacedStage, ...], Proof]:
        most = max(
            self.costs.kv_tokens(place, piece, piece + 1) for place in self._widest() for piece in self._pieces(place)
        )
        ladder = range(most, self.problem.min_kv_tokens - 1, -1)

        def limits(value: int) -> Limits:
            return Limits(bottleneck_ns=limit_ns, kv_tokens=value)

        def reached(found: Sequence[PlacedStage]) -> int:
            return most - self._remember(tuple(found)).kv_tokens

        best = Ladder(values=ladder, limits=limits, reached=reached)
        best.note(stages)
        self._close_in(best)
        if best.is_open and not self.budget.is_spent():
            self._capacity_by_model(best)
        assert best.stages is not None
        return best.stages, Proof(aim=Aim.KV_CAPACITY, value=best.value, bound=best.bound)

    def _widest(self) -> list[int]:
        """The roomiest place of each kind of held pieces: what a single piece can have at most."""
        by_held: dict[tuple[tuple[int, int], ...], int] = {}
        for place, kind in enumerate(self.search.kinds.of_place):
            held = self.search.kinds.kinds[kind].held
            other = by_held.setdefault(held, place)
            if self.problem.places[place].room_bytes > self.problem.places[other].room_bytes:
                by_held[held] = place
        return list(by_held.values())

    def _pieces(self, place: int) -> Sequence[int]:
        """The pieces of which a place may have most tokens by themselves: of those not held, the least will do."""
        pieces, held = self.problem.pieces, self.problem.places[place].held
        plain: dict[int, int] = {}  # the lightest by KV bytes per token
        for index, piece in enumerate(pieces):
            if index not in held:
                other = plain.setdefault(piece.kv_bytes_per_token, index)
                if piece.weight_bytes < pieces[other].weight_bytes:
                    plain[piece.kv_bytes_per_token] = index
        return [*held, *plain.values()]

    def _capacity_by_model(self, best: Ladder) -> None:
        better = best.limits(best.values[best.at - 1])
        segments = self._segments(better)
        if segments is None:
            return
        model = PlacementModel(self.problem, segments, bottleneck_ns=better.bottleneck_ns)
        answer = model.minimize(Aim.KV_CAPACITY, limit_s=self.budget.left_s)
        if answer.outcome is Outcome.INFEASIBLE:
            best.impossible = best.at - 1
        elif answer.bound is not None:
            best.impossible = max(best.impossible, best.values[0] + answer.bound - 1)
        if answer.found:
            best.stages, best.at = model.stages, best.values[0] - model.scores().kv_tokens

    # ---- the other aims

    def _rest(self, stages: tuple[PlacedStage, ...], limits: Limits) -> tuple[PlacedStage, ...]:
        """Settle cost of the change, fragmentation and bytes moved, in turn."""
        if self.budget.is_spent():
            return stages
        segments = self._segments(limits)
        whole = segments is not None
        if segments is None:
            choice = self._choice(stages)
            settled = len(choice) == len(stages) and self._same_for_all(Aim.CHANGE) and self._same_for_all(Aim.MOVED)
            if settled or self.search.num_runs(limits, choice) * _S_PER_SEGMENT > self.budget.left_s:
                return stages  # the same devices in any case, or no time
            segments = {
                place: list(self.costs.of(place, bottleneck_ns=limits.bottleneck_ns, kv_tokens=limits.kv_tokens))
                for place in choice
            }
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

    def _choice(self, stages: tuple[PlacedStage, ...]) -> list[int]:
        """Return the places at hand: those of the pipeline found, and those that hold pieces already."""
        chosen = {stage.place for stage in stages}
        return sorted(chosen | {place for place, found in enumerate(self.problem.places) if found.held})
