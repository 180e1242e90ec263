"""The rules of a placement, one function each, without a solver: what every plan is held against before it is used."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

from planner.placement import Placement, Scores
from planner.placement_problem import PlacementProblem
from topology.units import format_bytes


def check(problem: PlacementProblem, placement: Placement) -> tuple[str, ...]:
    """Return a sentence for each rule that ``placement`` breaks; nothing where it keeps them all."""
    for rule in (_known_places, _contiguous):  # the other rules make sense of stages only where these hold
        found = tuple(rule(problem, placement))
        if found:
            return found
    return tuple(sentence for rule in _RULES for sentence in rule(problem, placement))


def _known_places(problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    if len(placement.stages) != problem.num_stages:
        yield f"{problem.num_stages} stages were asked for, not {len(placement.stages)}"
    for index, stage in enumerate(placement.stages):
        if not 0 <= stage.place < len(problem.places):
            yield f"stage {index} is on place {stage.place}, of {len(problem.places)} places"


def _contiguous(problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    expected = 0
    for index, stage in enumerate(placement.stages):
        if stage.first != expected:
            yield f"stage {index} begins at piece {stage.first}, not at piece {expected}"
        if stage.end <= stage.first:
            yield f"stage {index} holds no piece"
        expected = stage.end
    if expected != len(problem.pieces):
        yield f"the stages end at piece {expected}, of {len(problem.pieces)}"


def _memory(problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    """Weights, the least KV capacity, activations, workspace and headroom fit, beside what is there already."""
    for index, stage in enumerate(placement.stages):
        place = problem.places[stage.place]
        need = _stage_bytes(problem, stage.place, stage.first, stage.end, problem.min_kv_tokens) + place.fixed_bytes
        if need > place.free_bytes:
            yield (
                f"stage {index} needs {format_bytes(need)} with KV cache for {problem.min_kv_tokens} tokens, "
                f"{place.name} offers {format_bytes(place.free_bytes)}"
            )


def _one_stage_per_device(_problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    used = Counter(device for stage in placement.stages for device in _problem.places[stage.place].device_ids)
    for device, count in used.items():
        if count > 1:
            yield f"{count} stages share device {device}"


def _groups_inside_an_island(problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    homes: dict[str, tuple[str, str]] = {}
    for place in problem.places:
        if len(place.device_ids) == 1:
            homes[place.device_ids[0]] = (place.host, place.island)
    for index, stage in enumerate(placement.stages):
        place = problem.places[stage.place]
        islands = {homes.get(device, (place.host, place.island)) for device in place.device_ids}
        if islands != {(place.host, place.island)}:
            yield f"stage {index}: the devices of {place.name} are not all in one island"
        if len(set(place.device_ids)) != len(place.device_ids):
            yield f"stage {index}: {place.name} names a device twice"


def _order(problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    if not problem.fixed_order:
        return
    chosen = [stage.place for stage in placement.stages]
    if any(place >= following for place, following in pairwise(chosen)):
        yield "stages do not follow the order of the places"
    if (chosen[0], chosen[-1]) != (0, len(problem.places) - 1):
        yield "the first and the last place must carry the first and the last stage"


def _latency(problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    limit, latency = problem.latency_limit_ns, sum(_stage_times(problem, placement))
    if limit is not None and latency > limit:
        yield f"a step takes {latency / 1e6:.6g} ms, {limit / 1e6:.6g} ms are allowed"


def _scores(problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    """What the plan says of itself, recomputed piece by piece."""
    said, times = placement.scores, _stage_times(problem, placement)
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
        if all(_fits(problem, s.place, s.first, s.end, tokens) for s in placement.stages) != fits and _has_kv(problem):
            yield f"KV cache for {tokens} tokens {'does not fit' if fits else 'fits'}, the plan says {said.kv_tokens}"


def _proofs(_problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    for proof in placement.proofs:
        if (
            proof.proven
            and placement.scores.of(proof.aim) != proof.value
            and proof.aim.name not in ("BOTTLENECK", "KV_CAPACITY")
        ):
            yield f"{proof.aim.value} is proven to be {proof.value}, but is {placement.scores.of(proof.aim)}"


def _has_kv(problem: PlacementProblem) -> bool:
    return any(piece.kv_bytes_per_token for piece in problem.pieces)


def _stage_bytes(problem: PlacementProblem, place: int, first: int, end: int, kv_tokens: int) -> int:
    held, whole = problem.places[place].held, end - first == len(problem.pieces)
    needs = [
        problem.pieces[p].weight_bytes + kv_tokens * problem.pieces[p].kv_bytes_per_token - held.get(p, 0)
        for p in range(first, end)
    ]
    return sum(max(0, need) for need in needs) - (problem.tied_bytes if whole else 0)


def _fits(problem: PlacementProblem, place: int, first: int, end: int, kv_tokens: int) -> bool:
    return _stage_bytes(problem, place, first, end, kv_tokens) <= problem.places[place].room_bytes


def _stage_times(problem: PlacementProblem, placement: Placement) -> list[int]:
    """Return the nanoseconds of each stage with the hop into it."""
    times = []
    for index, stage in enumerate(placement.stages):
        place = problem.places[stage.place]
        hop = 0
        if index:
            hop = problem.hops.between(problem.places[placement.stages[index - 1].place], place)
        times.append(hop + sum(problem.class_ns[place.speed_class][p] for p in range(stage.first, stage.end)))
    return times


_RULES: tuple[Callable[[PlacementProblem, Placement], Iterator[str]], ...] = (
    _memory,
    _one_stage_per_device,
    _groups_inside_an_island,
    _order,
    _latency,
    _scores,
    _proofs,
)
