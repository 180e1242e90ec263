"""What the placement solver answers: stages on places, what they score, and what is proven of each aim."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from planner.placement_problem import PlacementProblem

TOLERANCE_PERCENT = 1  # what a later aim may give away of the bottleneck, and of the KV capacity


class Aim(Enum):
    """The aims, the most important first."""

    BOTTLENECK = "bottleneck"
    KV_CAPACITY = "KV capacity"
    CHANGE = "cost of the change"
    FRAGMENTATION = "fragmentation"
    MOVED = "bytes moved"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedStage:
    """Pieces ``first <= p < end`` on the place with this number."""

    place: int
    first: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a placement reaches, by aim, and its latency: the time of all stages and hops together."""

    bottleneck_ns: int
    kv_tokens: int
    change_ns: int
    fragmentation: int
    moved_bytes: int
    latency_ns: int

    def of(self, aim: Aim) -> int:
        """Return the score of an aim."""
        return {
            Aim.BOTTLENECK: self.bottleneck_ns,
            Aim.KV_CAPACITY: self.kv_tokens,
            Aim.CHANGE: self.change_ns,
            Aim.FRAGMENTATION: self.fragmentation,
            Aim.MOVED: self.moved_bytes,
        }[aim]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The best value of an aim that was found, and what no placement can better.

    For the aims after the first, "no placement" means none within what the aims before reached. ``bound`` is true of
    the whole problem: uneven pieces, actual links, partial memory.
    """

    aim: Aim
    value: int
    bound: int

    @property
    def proven(self) -> bool:
        return self.value == self.bound

    @property
    def gap(self) -> float:
        """Return how far the value may be from the best there is, as a share of the value."""
        return abs(self.value - self.bound) / max(1, abs(self.value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A pipeline, its scores, and a proof for each aim that was worked on, in order."""

    stages: tuple[PlacedStage, ...]
    scores: Scores
    proofs: tuple[Proof, ...]

    @property
    def optimal(self) -> bool:
        """Whether every aim is proven; else time ran out, and this is the best that was found."""
        return len(self.proofs) == len(Aim) and all(proof.proven for proof in self.proofs)

    @property
    def gap(self) -> float:
        """Return the gap of the bottleneck."""
        return self.proofs[0].gap if self.proofs else 1.0

    def cuts(self) -> tuple[int, ...]:
        """Return the first piece of each stage but the first."""
        return tuple(stage.first for stage in self.stages[1:])


def bottleneck_limit_ns(bottleneck_ns: int) -> int:
    """Return the bottleneck that later aims may go up to."""
    return bottleneck_ns * (100 + TOLERANCE_PERCENT) // 100


def kv_limit_tokens(kv_tokens: int) -> int:
    """Return the KV capacity that later aims may go down to."""
    return -(-kv_tokens * (100 - TOLERANCE_PERCENT) // 100)


def stage_kv_tokens(problem: PlacementProblem, stage: PlacedStage) -> int:
    """Return the tokens whose KV cache fits beside the weights of the stage, -1 where the weights do not fit.

    A piece that is held here adds only what it needs beyond that. What is beyond use does not count; pieces without KV
    cache hold any number.
    """
    place = problem.places[stage.place]
    whole = stage.end - stage.first == len(problem.pieces)
    room = place.room_bytes + (problem.tied_bytes if whole else 0)
    pieces = [(problem.pieces[index], place.held.get(index, 0)) for index in range(stage.first, stage.end)]

    def need(tokens: int) -> int:
        return sum(max(0, p.weight_bytes + tokens * p.kv_bytes_per_token - held) for p, held in pieces)

    if need(0) > room:
        return -1
    if problem.kv_budget_bytes is not None:
        rate = sum(piece.kv_bytes_per_token for piece, _ in pieces)
        return min(problem.useful_kv_tokens, problem.kv_budget_bytes // rate) if rate else problem.useful_kv_tokens
    if need(problem.useful_kv_tokens) <= room:
        return problem.useful_kv_tokens
    surplus = sum(held - piece.weight_bytes for piece, held in pieces)
    tokens = (room + surplus) // sum(piece.kv_bytes_per_token for piece, _ in pieces)
    if all(p.weight_bytes + tokens * p.kv_bytes_per_token >= held for p, held in pieces):
        return tokens  # no piece has more than it needs, which is the rule
    return bisect_right(range(problem.useful_kv_tokens), room, key=need) - 1


def score(problem: PlacementProblem, stages: Sequence[PlacedStage]) -> Scores:
    """Return what ``stages`` score; whether they are allowed is for ``planner.checker`` to say."""
    times, latency, change, moved = [], 0, 0, 0
    before = None
    for stage in stages:
        place = problem.places[stage.place]
        hop = 0 if before is None else problem.hops.between(before, place)
        took = sum(problem.class_ns[place.speed_class][stage.first : stage.end])
        times.append(took + hop)
        latency += took + hop
        missing = missing_bytes(problem, stage)
        moved += missing
        change += change_ns(problem, stage)
        before = place
    touched = {device for stage in stages for device in problem.places[stage.place].device_ids}
    return Scores(
        bottleneck_ns=max(times),
        kv_tokens=min(stage_kv_tokens(problem, stage) for stage in stages),
        change_ns=change,
        fragmentation=sum(charge.points for charge in problem.charges if charge.device_ids & touched),
        moved_bytes=moved,
        latency_ns=latency,
    )


def missing_bytes(problem: PlacementProblem, stage: PlacedStage) -> int:
    """Return the bytes that come to the place for this stage: weights and live KV cache of pieces it does not hold."""
    held = problem.places[stage.place].held
    pieces = [problem.pieces[p] for p in range(stage.first, stage.end) if p not in held]
    return sum(piece.weight_bytes + piece.live_kv_bytes for piece in pieces)


def change_ns(problem: PlacementProblem, stage: PlacedStage) -> int:
    """Return what it costs to bring those bytes here, with the risk of touching a stage at all."""
    missing = missing_bytes(problem, stage)
    if missing == 0:
        return 0
    return -(-missing * 1_000_000_000 // problem.places[stage.place].arrival_bytes_per_s) + problem.risk_ns
