"""The rules of a placement, one function each, without a solver: what every plan is held against before it is used.

That a group of devices lies inside one island is a rule, too: ``PlacementProblem`` refuses any other.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from planner.placement import Aim, PlacedStage, Placement, Scores, bottleneck_limit_ns, kv_limit_tokens
from planner.placement_problem import PlacementProblem
from topology.units import format_bytes

Stages = Sequence[PlacedStage]


def check(problem: PlacementProblem, placement: Placement) -> tuple[str, ...]:
    """Return a sentence for each rule that ``placement`` breaks, and for each figure of it that is not so."""
    broken = check_stages(problem, placement.stages)
    return broken or (*_scores(problem, placement), *_proofs(placement))


def check_stages(problem: PlacementProblem, stages: Stages) -> tuple[str, ...]:
    """Return a sentence for each rule that ``stages`` break; nothing where they keep them all."""
    for rule in (_known_places, _contiguous):  # the other rules make sense of stages only where these hold
        found = tuple(rule(problem, stages))
        if found:
            return found
    return tuple(sentence for rule in _RULES for sentence in rule(problem, stages))


def _known_places(problem: PlacementProblem, stages: Stages) -> Iterator[str]:
    if len(stages) != problem.num_stages:
        yield f"{problem.num_stages} stages were asked for, not {len(stages)}"
    for index, stage in enumerate(stages):
        if not 0 <= stage.place < len(problem.places):
            yield f"stage {index} is on place {stage.place}, of {len(problem.places)} places"


def _contiguous(problem: PlacementProblem, stages: Stages) -> Iterator[str]:
    expected = 0
    for index, stage in enumerate(stages):
        if stage.first != expected:
            yield f"stage {index} begins at piece {stage.first}, not at piece {expected}"
        if stage.end <= stage.first:
            yield f"stage {index} holds no piece"
        expected = stage.end
    if expected != len(problem.pieces):
        yield f"the stages end at piece {expected}, of {len(problem.pieces)}"


def _memory(problem: PlacementProblem, stages: Stages) -> Iterator[str]:
    """Weights, the least KV capacity, activations, workspace and headroom fit, beside what is there already."""
    for index, stage in enumerate(stages):
        place = problem.places[stage.place]
        need = _stage_bytes(problem, stage.place, stage.first, stage.end, problem.min_kv_tokens) + place.fixed_bytes
        if need > place.free_bytes:
            yield (
                f"stage {index} needs {format_bytes(need)} with KV cache for {problem.min_kv_tokens} tokens, "
                f"{place.name} offers {format_bytes(place.free_bytes)}"
            )
        kv = _kv_bytes(problem, stage.first, stage.end, problem.min_kv_tokens)
        if problem.kv_budget_bytes is not None and kv > problem.kv_budget_bytes:
            yield (
                f"stage {index} needs {format_bytes(kv)} for KV cache for {problem.min_kv_tokens} tokens, "
                f"its budget is {format_bytes(problem.kv_budget_bytes)}"
            )


def _one_stage_per_device(problem: PlacementProblem, stages: Stages) -> Iterator[str]:
    used = Counter(device for stage in stages for device in problem.places[stage.place].device_ids)
    for device, count in used.items():
        if count > 1:
            yield f"{count} stages share device {device}"


def _order(problem: PlacementProblem, stages: Stages) -> Iterator[str]:
    if not problem.fixed_order:
        return
    chosen = [stage.place for stage in stages]
    if any(place >= following for place, following in pairwise(chosen)):
        yield "stages do not follow the order of the places"
    if (chosen[0], chosen[-1]) != (0, len(problem.places) - 1):
        yield "the first and the last place must carry the first and the last stage"


def _latency(problem: PlacementProblem, stages: Stages) -> Iterator[str]:
    limit, latency = problem.latency_limit_ns, sum(_stage_times(problem, stages))
    if limit is not None and latency > limit:
        yield f"a step takes {latency / 1e6:.6g} ms, {limit / 1e6:.6g} ms are allowed"


def _scores(problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    """What the plan says of itself, recomputed piece by piece."""
    said, times = placement.scores, _stage_times(problem, placement.stages)
    touched = {device for stage in placement.stages for device in problem.places[stage.place].device_ids}
    moved = change = 0
    for stage in placement.stages:
        place = problem.places[stage.place]
        missing = [problem.pieces[p] for p in range(stage.first, stage.end) if p not in place.held]
        size = sum(piece.weight_bytes + piece.live_kv_bytes for piece in missing)
        moved += size
        change += -(-size * 10**9 // place.arrival_bytes_per_s) + problem.risk_ns if size else 0
    true = Scores(
        bottleneck_ns=max(times),
        latency_ns=sum(times),
        kv_tokens=said.kv_tokens,
        change_ns=change,
        moved_bytes=moved,
        fragmentation=sum(c.points for c in problem.charges if not c.device_ids.isdisjoint(touched)),
    )
    if said != true:
        yield f"the plan says {said}, but it comes to {true}"
    for tokens, fits in ((said.kv_tokens, True), (said.kv_tokens + 1, False)):
        if tokens > problem.useful_kv_tokens:
            continue
        if all(_fits(problem, s.place, s.first, s.end, tokens) for s in placement.stages) != fits and _has_kv(problem):
            yield f"KV cache for {tokens} tokens {'does not fit' if fits else 'fits'}, the plan says {said.kv_tokens}"


def _proofs(placement: Placement) -> Iterator[str]:
    """No aim gives away more than it may of what was found best, and none betters its bound."""
    for proof in placement.proofs:
        score, name = placement.scores.of(proof.aim), proof.aim.value
        match proof.aim:
            case Aim.BOTTLENECK:
                holds = proof.bound <= score <= bottleneck_limit_ns(proof.value)
            case Aim.KV_CAPACITY:
                holds = kv_limit_tokens(proof.value) <= score <= proof.bound
            case Aim.CHANGE | Aim.FRAGMENTATION | Aim.MOVED:
                holds = proof.bound <= score <= proof.value
        if not holds:
            yield f"{name} is {score}: not between the bound {proof.bound} and the best found, {proof.value}"


def _has_kv(problem: PlacementProblem) -> bool:
    return any(piece.kv_bytes_per_token for piece in problem.pieces)


def _stage_bytes(problem: PlacementProblem, place: int, first: int, end: int, kv_tokens: int) -> int:
    held, whole = problem.places[place].held, end - first == len(problem.pieces)
    if problem.kv_budget_bytes is not None:
        kv_tokens = 0
    needs = [
        problem.pieces[p].weight_bytes + kv_tokens * problem.pieces[p].kv_bytes_per_token - held.get(p, 0)
        for p in range(first, end)
    ]
    return sum(max(0, need) for need in needs) - (problem.tied_bytes if whole else 0)


def _fits(problem: PlacementProblem, place: int, first: int, end: int, kv_tokens: int) -> bool:
    budget = problem.kv_budget_bytes
    if budget is not None and _kv_bytes(problem, first, end, kv_tokens) > budget:
        return False
    return _stage_bytes(problem, place, first, end, kv_tokens) <= problem.places[place].room_bytes


def _kv_bytes(problem: PlacementProblem, first: int, end: int, kv_tokens: int) -> int:
    return kv_tokens * sum(problem.pieces[p].kv_bytes_per_token for p in range(first, end))


def _stage_times(problem: PlacementProblem, stages: Stages) -> list[int]:
    """Return the nanoseconds of each stage with the hop into it."""
    times = []
    for index, stage in enumerate(stages):
        place = problem.places[stage.place]
        hop = 0
        if index:
            hop = problem.hops.between(problem.places[stages[index - 1].place], place)
        times.append(hop + sum(problem.class_ns[place.speed_class][p] for p in range(stage.first, stage.end)))
    return times


_RULES: tuple[Callable[[PlacementProblem, Stages], Iterator[str]], ...] = (
    _memory,
    _one_stage_per_device,
    _order,
    _latency,
)
