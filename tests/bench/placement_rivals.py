"""What people do today to place a pipeline, on the problems that the solver is given."""

from collections.abc import Callable, Sequence

from planner.checker import check_stages
from planner.placement import PlacedStage, Scores, score
from planner.placement_problem import PlacementProblem

CONTEXT_TOKENS = 2048  # of a request


def throughput(scores: Scores, *, requests: int) -> float:
    """Return tokens per second up to a factor, where ``requests`` wait: as many as fit, by the bottleneck."""
    return min(requests, scores.kv_tokens // CONTEXT_TOKENS) / scores.bottleneck_ns


def equal_layers(problem: PlacementProblem) -> Scores | None:
    """Equal layers per stage on the devices with the most free memory; the first stages take what is left over."""
    share, more = divmod(len(problem.pieces), problem.num_stages)
    return _scores(problem, _roomiest(problem), [share + (s < more) for s in range(problem.num_stages)])


def vllm_default(problem: PlacementProblem) -> Scores | None:
    """As vLLM's ``get_pp_indices``: equal, what is left over goes to the stages before the last, last ones first."""
    share, more = divmod(len(problem.pieces), problem.num_stages)
    counts = [share] * problem.num_stages
    for back in range(2, more + 2):
        counts[-back] += 1
    return _scores(problem, _roomiest(problem), counts)


def by_free_memory(problem: PlacementProblem) -> Scores | None:
    """As exo: layers in proportion to free memory, on the devices with the most of it."""
    order = _roomiest(problem)
    return _scores(problem, order, _in_proportion([problem.places[p].free_bytes for p in order], len(problem.pieces)))


def greedy(problem: PlacementProblem) -> Scores | None:
    """The fastest devices, each with layers in proportion to its speed, as far as its memory reaches."""
    places = problem.places

    def slowness(place: int) -> int:
        return sum(problem.class_ns[places[place].speed_class])

    average = sum(piece.weight_bytes for piece in problem.pieces) // len(problem.pieces)
    able = [p for p in range(len(places)) if places[p].room_bytes > average * len(problem.pieces) // problem.num_stages]
    order = sorted(sorted(able, key=slowness)[: problem.num_stages], key=lambda p: places[p].host)
    if len(order) < problem.num_stages:
        return None
    return _scores(problem, order, _in_proportion([1e12 / slowness(place) for place in order], len(problem.pieces)))


RIVALS: dict[str, Callable[[PlacementProblem], Scores | None]] = {
    "equal layers": equal_layers,
    "vLLM's default": vllm_default,
    "by free memory (exo)": by_free_memory,
    "greedy": greedy,
}


def _roomiest(problem: PlacementProblem) -> list[int]:
    """The devices with the most free memory, those of a host side by side."""
    ordered = sorted(range(len(problem.places)), key=lambda p: -problem.places[p].free_bytes)
    return sorted(ordered[: problem.num_stages], key=lambda p: problem.places[p].host)


def _in_proportion(weights: Sequence[float], total: int) -> list[int]:
    """Return whole numbers of at least 1 that add up to ``total``, by the largest remainders."""
    exact = [max(1.0, weight * total / sum(weights)) for weight in weights]
    counts = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda at: counts[at] - exact[at])
    for at in order[: max(0, total - sum(counts))]:
        counts[at] += 1
    while sum(counts) > total:
        counts[counts.index(max(counts))] -= 1
    return counts


def _scores(problem: PlacementProblem, order: Sequence[int], counts: Sequence[int]) -> Scores | None:
    """Return the scores, None where it does not fit."""
    stages, first = [], 0
    for place, count in zip(order, counts, strict=True):
        stages.append(PlacedStage(place=place, first=first, end=first + count))
        first += count
    return None if check_stages(problem, stages) else score(problem, stages)
